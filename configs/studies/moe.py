"""What do experts give at equal FLOPs a token? Against a dense network of the same active size.

helios ablate --study=moe --workdir=runs/moe --config.data.corpus='linux/Documentation/**/*.rst'

Two of eight experts have the hidden size of the dense layer between them. A mixture has three times
the parameters. On a GPU other than Hopper mixtures are slow.
"""

from helios_jax.ablate.study import Study

EXPERTS = {
    'model.period': 'moe',
    'model.moe.num_experts': 8,
    'model.moe.num_experts_per_token': 2,
    'model.moe.mlp_dim': 704,
}


def get_study() -> Study:
    return Study(
        question='How much do experts help at equal FLOPs a token, and which router and balance?',
        config='study_77m',
        baseline='dense',
        arms={
            'dense': {},
            'bias': EXPERTS,
            'aux': EXPERTS | {'model.moe.balance': 'aux'},
            'both': EXPERTS | {'model.moe.balance': 'both'},
            'no_balance': EXPERTS | {'model.moe.balance': 'none'},
            'sigmoid': EXPERTS | {'model.moe.scores': 'sigmoid'},
            'four_of_16': EXPERTS
            | {
                'model.moe.num_experts': 16,
                'model.moe.num_experts_per_token': 4,
                'model.moe.mlp_dim': 352,
            },
        },
        equal=('tokens', 'flops'),
    )
