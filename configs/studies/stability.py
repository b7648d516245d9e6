"""Which unit stands the highest learning rate? Rates doubled until runs diverge.

helios ablate --study=stability --workdir=runs/stability \
    --config.data.corpus='linux/Documentation/**/*.rst'

The learning-rate bowls of the report are the answer, with the spikes of each loss; a run that
diverged is a failed one of its arm's search. Seeds are spent at the best rates.
"""

from helios_jax.ablate.study import Study


def get_study() -> Study:
    return Study(
        question='Up to which learning rate does each unit train, and with how many spikes?',
        config='study_77m',
        overrides={'train.log_every': 2},
        baseline='residual',
        arms={
            'residual': {'model.gmu.kind': 'residual'},
            'x_plus_u': {'model.gmu.kind': 'residual', 'model.gmu.normalize_output': 'on'},
            'rezero': {'model.gmu.kind': 'rezero'},
            'convex': {},
            'convex_u': {'model.gmu.normalize_output': 'off'},
        },
        learning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    )
