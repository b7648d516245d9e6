"""Llama-3.1-8B's shape with GMUs: a TPU pod slice, such as v5p:2x2x4 (16 chips).

helios train --config=helios_8b --workdir=gs://BUCKET/helios_8b --config.data.corpus=tfds:NAME \
    --config.data.tokenizer=tokenizer.json
helios plan --config=helios_8b --topology=v5p:2x2x4 --compile   (memory, without a TPU)

Compiled for 16 v5p chips: 5.7 GiB of state a chip, 14.0 GiB temporary, 15.1 GiB at the peak.
"""

import ml_collections

from helios_jax.config import Config, Data, Memory, Model, Optimizer, Rope, Train, to_dict


def get_config() -> ml_collections.ConfigDict:
    return to_dict(
        Config(
            model=Model(
                vocab_size=128_256,
                num_layers=32,
                embed_dim=4096,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                mlp_dim=14_336,
                norm_eps=1e-5,
                rope=Rope(base=500_000.0),
            ),
            data=Data(tokenizer='tokenizer.json', row_length=4096),
            optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2000),
            train=Train(
                num_steps=200_000,
                batch_rows=64,
                eval_every=2000,
                eval_rows=1024,
                checkpoint_every=1000,
            ),
            memory=Memory(policy='full'),
        )
    )
