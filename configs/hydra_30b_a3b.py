"""Qwen3-30B-A3B's shape with GMUs: 128 experts, 8 a token, 3.3 billion active; 32 v5p chips.

helios train --config=hydra_30b_a3b --workdir=gs://BUCKET/hydra_30b --config.data.corpus=tfds:NAME \
    --config.data.tokenizer=tokenizer.json
helios plan --config=hydra_30b_a3b --topology=v5p:4x4x2 --compile   (memory, without a TPU)

Compiled for 32 v5p chips, with model.gmu.kind=residual: 10.7 GiB of state a chip, 16.0 GiB
temporary, 20.7 GiB at the peak.
"""

import ml_collections

from helios_jax.configs import hydra_8x7b


def get_config() -> ml_collections.ConfigDict:
    config = hydra_8x7b.get_config()
    config.model.update(
        vocab_size=151_936,
        num_layers=48,
        embed_dim=2048,
        num_kv_heads=4,
        mlp_dim=6144,
        norm_eps=1e-6,
        qk_norm=True,
    )
    config.model.moe.update(num_experts=128, num_experts_per_token=8, mlp_dim=768)
    return config
