"""What must a gate see, its sublayer's input or its output too? Beside x + û, at one rate.

helios ablate --study=gate_input --workdir=runs/gate_input \
    --config.data.corpus='linux/Documentation/**/*.rst'

The corpus: git clone --depth=1 https://github.com/torvalds/linux.
"""

from helios_jax.ablate.study import Study

RESIDUAL = {'model.gmu.kind': 'residual', 'model.gmu.normalize_output': 'on'}


def get_study() -> Study:
    return Study(
        question='Does a gate that sees its output too learn more than one that sees its input?',
        config='study_77m',
        baseline='x_plus_u',
        arms={
            'x_plus_u': RESIDUAL,
            'input': {'model.gmu.gate_input': 'input'},
            'both': {'model.gmu.gate_input': 'both'},
        },
        equal=('tokens', 'parameters', 'flops'),
    )
