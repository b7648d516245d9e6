"""Mixtral-8x7B's shape with GMUs: 46.7 billion parameters, 12.9 active; 32 v5p chips.

helios train --config=hydra_8x7b --workdir=gs://BUCKET/hydra_8x7b --config.data.corpus=tfds:NAME \
    --config.data.tokenizer=tokenizer.json
helios plan --config=hydra_8x7b --topology=v5p:4x4x2 --compile   (memory, without a TPU)

State takes 16.3 GiB of each of 32 v5p chips.
"""

import ml_collections

from helios_jax.configs import helios_8b


def get_config() -> ml_collections.ConfigDict:
    config = helios_8b.get_config()
    config.model.update(vocab_size=32_000, period='moe')
    config.model.rope.update(base=1_000_000.0)
    config.model.moe.update(num_experts=8, num_experts_per_token=2)
    config.train.update(batch_rows=128)
    return config
