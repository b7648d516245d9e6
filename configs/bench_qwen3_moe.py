"""Qwen3-MoE's shape, 2.7 billion parameters and 0.5 active, to train beside transformers' own.

helios bench train --config=bench_qwen3_moe --kinds=residual --packings=concatenate

With --peer the same run measures transformers' too. Layers are Qwen3-30B-A3B's, with 64 experts for
its 128; the vocabulary has 32,768 tokens. One H200 (jax 0.11.2): 114,700 tokens a second, MFU 0.46,
65 GiB; two minutes to compile.
"""

import ml_collections

from helios_jax.configs import helios_1b


def get_config() -> ml_collections.ConfigDict:
    config = helios_1b.get_config()
    config.model.update(num_layers=8, num_heads=32, qk_norm=True, period='moe')
    config.model.gmu.update(kind='residual')
    config.model.moe.update(num_experts=64, num_experts_per_token=8, mlp_dim=768)
    config.data.update(packing='concatenate')
    config.train.update(num_steps=20)
    config.memory.update(layers='unrolled')
    return config
