"""The first study to run: gates against a plain residual, a very small model, minutes on a CPU.

helios ablate --study=smoke --workdir=runs/smoke
"""

from helios_jax.ablate.study import Study


def get_study() -> Study:
    return Study(
        question='Does a very small model learn faster with gates than with plain residuals?',
        config='tiny',
        overrides={
            'model.num_layers': 2,
            'model.embed_dim': 64,
            'model.num_heads': 2,
            'model.num_kv_heads': 1,
            'model.mlp_dim': 192,
            'data.row_length': 128,
            'train.num_steps': 100,
            'train.log_every': 5,
            'train.eval_every': 25,
            'train.eval_rows': 64,
            'train.checkpoint_every': 0,
            'train.keep_checkpoints': 1,
            'train.tensorboard': False,
        },
        baseline='residual',
        arms={'residual': {'model.gmu.kind': 'residual'}, 'convex': {}},
        seeds=2,
    )
