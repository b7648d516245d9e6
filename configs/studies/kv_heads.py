"""What do fewer key/value heads cost? Eight query heads share 8, 4, 2 or 1.

helios ablate --study=kv_heads --workdir=runs/kv_heads \
    --config.data.corpus='linux/Documentation/**/*.rst'

The MLP grows by what the heads save, so that every arm has the same parameters and FLOPs a token.
"""

from helios_jax.ablate.study import Study


def get_study() -> Study:
    widths = {8: 1408, 4: 1584, 2: 1664, 1: 1712}  # of equal parameters, within 0.5%
    return Study(
        question='What do fewer key/value heads cost at equal parameters and FLOPs?',
        config='study_77m',
        baseline='kv_8',
        arms={
            f'kv_{heads}': {'model.num_kv_heads': heads, 'model.mlp_dim': width}
            for heads, width in widths.items()
        },
        equal=('tokens', 'parameters', 'flops'),
    )
