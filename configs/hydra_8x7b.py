"""Mixtral-8x7B's shape with GMUs: 46.7 billion parameters, 12.9 active; 32 v5p chips.

helios train --config=hydra_8x7b --workdir=gs://BUCKET/hydra_8x7b --config.data.corpus=tfds:NAME \
    --config.data.tokenizer=tokenizer.json
helios plan --config=hydra_8x7b --topology=v5p:4x4x2 --compile   (memory, without a TPU)

Compiled for 32 v5p chips: 16.3 GiB of state a chip, 25.2 GiB temporary, 34.3 GiB at the peak.
"""

import ml_collections

from helios_jax.config import Config, Data, Memory, Model, MoE, Optimizer, Rope, Train, to_dict


def get_config() -> ml_collections.ConfigDict:
    return to_dict(
        Config(
            model=Model(
                vocab_size=32_000,
                num_layers=32,
                embed_dim=4096,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                mlp_dim=14_336,
                period='moe',
                norm_eps=1e-5,
                rope=Rope(base=1_000_000.0),
                moe=MoE(num_experts=8, num_experts_per_token=2),
            ),
            data=Data(tokenizer='tokenizer.json', row_length=4096),
            optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2000),
            train=Train(
                num_steps=200_000,
                batch_rows=128,
                eval_every=2000,
                eval_rows=1024,
                checkpoint_every=1000,
            ),
            memory=Memory(policy='full'),
        )
    )
