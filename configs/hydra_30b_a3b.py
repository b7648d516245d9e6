"""Qwen3-30B-A3B's shape with GMUs: 128 experts, 8 a token, 3.3 billion active; 32 v5p chips.

helios train --config=hydra_30b_a3b --workdir=gs://BUCKET/hydra_30b --config.data.corpus=tfds:NAME \
    --config.data.tokenizer=tokenizer.json
helios plan --config=hydra_30b_a3b --topology=v5p:4x4x2 --compile   (memory, without a TPU)

Compiled for 32 v5p chips: 10.7 GiB of state a chip, 21.0 GiB temporary, 22.0 GiB at the peak.
"""

import ml_collections

from helios_jax.config import Config, Data, Memory, Model, MoE, Optimizer, Rope, Train, to_dict


def get_config() -> ml_collections.ConfigDict:
    return to_dict(
        Config(
            model=Model(
                vocab_size=151_936,
                num_layers=48,
                embed_dim=2048,
                num_heads=32,
                num_kv_heads=4,
                head_dim=128,
                mlp_dim=6144,
                period='moe',
                qk_norm=True,
                rope=Rope(base=1_000_000.0),
                moe=MoE(num_experts=128, num_experts_per_token=8, mlp_dim=768),
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
