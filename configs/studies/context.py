"""Which model reads farthest past its trained rows, and how? YaRN's variants, its rivals, training.

helios ablate --study=context --workdir=runs/context

Models of 25M parameters learn rows of 512 bytes of Python's standard library, and read held-out
rows of up to sixteen times that, with each method of stretching positions. The first three arms
train alike: they differ in the ramp of YaRN, which leads from the frequencies that it keeps to
those that it stretches. For an accelerator.
"""

from helios_jax.ablate.study import Study

WINDOW = {'model.window': 256}


def get_study() -> Study:
    return Study(
        question='Which model of rows of 512 bytes reads the longest rows, and by which method?',
        config='stdlib_25m',
        overrides={
            'train.num_steps': 1000,  # after which it begins to know the text by heart
            'train.eval_rows': 512,
            'train.checkpoint_every': 0,
            'train.keep_checkpoints': 1,
            'train.tensorboard': False,
        },
        baseline='base_10k',
        arms={
            'base_10k': {},
            'ramp_in_rotations': {'model.rope.ramp': 'linear_in_rotations'},
            'ramp_2_to_1': {'model.rope.beta_fast': 2.0},
            'base_1k': {'model.rope.base': 1e3},
            'base_100k': {'model.rope.base': 1e5},
            'windows_3_of_4': WINDOW | {'model.period': 3 * 'dense_window,' + 'dense'},
            'windows_7_of_8': WINDOW | {'model.period': 7 * 'dense_window,' + 'dense'},
        },
        lengths=(1024, 2048, 4096, 8192),
        methods=('none', 'pi', 'ntk', 'yarn', 'dynamic'),
    )
