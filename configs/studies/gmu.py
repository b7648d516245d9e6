"""Which part of the gated unit helps? Kind, gate, what it sees, its bias and the embedding's term.

helios ablate --study=gmu --workdir=runs/gmu --config.data.corpus='linux/Documentation/**/*.rst'

Every arm differs from `convex`, the default, in what its name says, and has its own best of three
learning rates: 78 runs of a minute each on an H200. --budget_minutes drops seeds, --arms takes
some of the arms. The study `zoo` has other residual connections.
"""

from helios_jax.ablate.study import Study


def get_study() -> Study:
    return Study(
        question='Which part of the gated unit helps, over the strongest residual, x + û?',
        config='study_77m',
        baseline='x_plus_u',
        arms={
            'x_plus_u': {'model.gmu.kind': 'residual', 'model.gmu.normalize_output': 'on'},
            'convex': {},
            'convex_u': {'model.gmu.normalize_output': 'off'},
            'additive': {'model.gmu.kind': 'additive', 'model.gmu.bias': '0'},
            'additive_norm': {
                'model.gmu.kind': 'additive',
                'model.gmu.bias': '0',
                'model.gmu.normalize_output': 'on',
            },
            'full': {'model.gmu.gate': 'full'},
            'per_head': {'model.gmu.gate': 'per_head'},
            'scalar': {'model.gmu.gate': 'scalar'},
            'static': {'model.gmu.gate': 'static'},
            'sees_output': {'model.gmu.gate_input': 'output'},
            'sees_both': {'model.gmu.gate_input': 'both'},
            'bias_minus_3': {'model.gmu.bias': '-3'},
            'embedding': {'model.gmu.embedding': 'on'},
        },
        learning_rates=(5e-4, 1e-3, 2e-3),
    )
