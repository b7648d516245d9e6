"""Do experts help at equal FLOPs a token? The two smallest models that ship, in minutes.

helios ablate --study=tiny_hydra --workdir=runs/tiny_hydra

Two of eight experts have the hidden size of the dense layer between them, in three of four layers.
"""

from helios_jax.ablate.study import Study


def get_study() -> Study:
    return Study(
        question='Does tiny_hydra learn more than tiny from the same text and FLOPs a token?',
        config='tiny',
        baseline='tiny',
        arms={
            'tiny': {},
            'tiny_hydra': {
                'model.prefix': 'dense',
                'model.period': 'moe',
                'model.moe.num_experts': 8,
                'model.moe.num_experts_per_token': 2,
                'model.moe.mlp_dim': 192,
            },
        },
        equal=('tokens', 'flops'),
    )
