"""Which way of joining sublayers to the stream learns most? Each at its own best learning rate.

helios ablate --study=zoo --workdir=runs/zoo --config.data.corpus='linux/Documentation/**/*.rst'

x + û (peri-norm, 2502.02732) is the baseline, the strongest of the plain residuals. `lambdas` is
λx + û + αx₀, `hyper` Hyper-Connections (2409.19606) and their constrained form (2512.24880),
`review` Review Residuals (2606.31859), `norm_scale` LayerNorm scaling (2502.05795),
`value_residual` ResFormer's (2410.17897), `denseformer` averages of all outputs so far (4x5 of
2402.02622), `residual_depth` GPT-2's initialisation. --arms runs some
of them, and later more in the same workdir;
--config.model.num_layers asks the same of other depths.
"""

from helios_jax.ablate.study import Study

RESIDUAL = {'model.gmu.kind': 'residual'}
X_PLUS_U = RESIDUAL | {'model.gmu.normalize_output': 'on'}


def get_study() -> Study:
    return Study(
        question='Which residual connection learns most from the same text?',
        config='study_77m',
        baseline='x_plus_u',
        arms={
            'x_plus_u': X_PLUS_U,
            'residual': RESIDUAL,
            'residual_depth': RESIDUAL | {'model.output_init': 'depth'},
            'norm_scale': RESIDUAL | {'model.norm_scale': 'depth'},
            'lambdas': X_PLUS_U | {'model.gmu.stream_scale': 'on', 'model.gmu.embedding': 'on'},
            'value_residual': X_PLUS_U | {'model.value_residual': True},
            'denseformer': X_PLUS_U | {'model.gmu.dwa': '4x5'},
            'layerscale': {'model.gmu.kind': 'layerscale'},
            'rezero': {'model.gmu.kind': 'rezero'},
            'highway': {'model.gmu.kind': 'highway', 'model.gmu.bias': '-3'},
            'hyper': {'model.gmu.kind': 'hyper'},
            'hyper_constrained': {'model.gmu.kind': 'hyper', 'model.gmu.hyper': 'constrained'},
            'review': {
                'model.gmu.kind': 'additive',
                'model.gmu.gate': 'full',
                'model.gmu.gate_input': 'both',
                'model.gmu.bias': '0',
            },
            'convex': {},
            'convex_embedding': {'model.gmu.embedding': 'on'},
        },
        learning_rates=(5e-4, 1e-3, 2e-3),
    )
