"""25 million parameters that learn the Python standard library in minutes, on one accelerator.

helios train --config=stdlib_25m --workdir=runs/stdlib_25m

Rows are 512 bytes; YaRN reads the model far past them (docs/results/ has its card). A step reads
32,768 bytes, and 350 steps all of the library once: after a thousand it begins to know the text by
heart, so read `--step=best` (1.03 held-out bits per byte, two minutes on a shared H200).
"""

import ml_collections

from helios_jax.config import Config, Data, Memory, Model, Optimizer, Train, to_dict


def get_config() -> ml_collections.ConfigDict:
    return to_dict(
        Config(
            model=Model(
                num_layers=8,
                embed_dim=512,
                num_heads=8,
                num_kv_heads=4,
                head_dim=64,
                mlp_dim=1536,
            ),
            data=Data(row_length=512, validation_fraction=0.05),
            optimizer=Optimizer(learning_rate=1.5e-3, warmup_steps=150),
            train=Train(
                num_steps=1500,
                batch_rows=64,
                eval_every=250,
                eval_rows=0,
                checkpoint_every=250,
            ),
            memory=Memory(policy='minimal'),
        )
    )
