"""The default run: a byte-level model on the Python standard library, in minutes on two cores.

helios train --config=tiny --workdir=runs/tiny
"""

import ml_collections

from helios_jax.config import Config, Data, Memory, Model, Optimizer, Train, to_dict


def get_config() -> ml_collections.ConfigDict:
    return to_dict(
        Config(
            model=Model(
                num_layers=4,
                embed_dim=192,
                num_heads=6,
                num_kv_heads=2,
                head_dim=32,
                mlp_dim=512,
                compute_dtype='float32',
            ),
            data=Data(corpus='python_stdlib', tokenizer='bytes', row_length=256),
            optimizer=Optimizer(learning_rate=3e-3, warmup_steps=50),
            train=Train(num_steps=600, batch_rows=16, eval_every=200, checkpoint_every=200),
            memory=Memory(policy='none'),
        )
    )
