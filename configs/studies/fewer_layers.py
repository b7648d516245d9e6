"""Do gates save layers? Gated networks of 24, 20, 16 and 12 layers against 24 layers of x + û.

helios ablate --study=fewer_layers --workdir=runs/fewer_layers \
    --config.data.corpus='linux/Documentation/**/*.rst'

All read the same rows. The residual network of 16 layers is there too: what fewer layers cost it.
"""

from helios_jax.ablate.study import Study

X_PLUS_U = {'model.gmu.kind': 'residual', 'model.gmu.normalize_output': 'on'}


def get_study() -> Study:
    return Study(
        question='How many gated layers learn as much as 24 layers of x + û from the same text?',
        config='study_77m',
        baseline='x_plus_u_24',
        arms={
            'x_plus_u_24': X_PLUS_U,
            'x_plus_u_16': X_PLUS_U | {'model.num_layers': 16},
            **{f'convex_{layers}': {'model.num_layers': layers} for layers in (24, 20, 16, 12)},
        },
        learning_rates=(1e-3, 2e-3, 3e-3),
    )
