"""Memory policies side by side: loss and gradient of 16 layers of D 4096, on one 80 GB device.

helios bench memory --config=bench_memory

One H100 (jax 0.11.2), GiB saved for backward, temporary, the allocator's peak, and ms a step:
    minimal 22.2, 31.1, 47.3, 628    fp8 11.2, 20.0, 36.3, 629    full 2.1, 11.2, 27.5, 762
    fp8_offload 0.1 (host 1.0), 9.3, 25.6, 782    none 126.4 temporary: does not fit
"""

import ml_collections

from helios_jax.configs import helios_1b


def get_config() -> ml_collections.ConfigDict:
    config = helios_1b.get_config()
    config.model.update(
        vocab_size=0, num_layers=16, embed_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=11_264
    )
    config.data.update(tokenizer='bytes', packing='concatenate')
    config.train.update(batch_rows=4)
    return config
