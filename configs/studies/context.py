"""How best to read rows of four times the trained length? The parts of YaRN, and its rivals.

helios ablate --study=context --workdir=runs/context

Runs train rows of 256 tokens and are scored on held-out rows of 1,024: the arms differ in how
positions stretch to these, and in how the model was made for it. For another length take another
workdir: --workdir=runs/context_2048 --config.train.long_length=2048. Minutes on a CPU.
"""

from helios_jax.ablate.study import LONG, Study


def get_study() -> Study:
    method = lambda name: {'train.long_method': name}
    return Study(
        question='How best does a model of rows of 256 tokens read rows of 1,024?',
        config='tiny',
        overrides={'train.long_length': 1024, 'train.eval_rows': 1024},
        metric=LONG,
        baseline='dynamic',
        arms={
            'dynamic': {},
            'dynamic_in_rotations': {'model.rope.ramp': 'linear_in_rotations'},
            'yarn': method('yarn'),
            'ntk': method('ntk'),
            'pi': method('pi'),
            'none': method('none'),
            'base_100k': {'model.rope.base': 1e5},
            'base_100k_none': {'model.rope.base': 1e5} | method('none'),
            # Learns with YaRN at s = 4, and is read at s = 16.
            'trained_stretched': {
                'model.rope.trained_length': 64,
                'model.rope.scaling': 'static',
                'model.rope.factor': 4.0,
                **method('yarn'),
            },
            'one_stream': {'data.packing': 'concatenate'},  # attention crosses documents
        },
        equal=('tokens', 'parameters'),
    )
