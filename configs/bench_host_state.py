"""The most parameters that one 80 GB accelerator trains: state in the host's memory, 8B's layers.

export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
helios bench train --config=bench_host_state --kinds=convex --packings=concatenate
helios bench train --config=bench_host_state --kinds=convex --packings=concatenate \
    --config.model.num_layers=36 --config.memory.backward_parts=4 --config.train.num_steps=3 \
    --warmup_steps=1 --profiled_steps=0

One H100 with 126 GiB of host memory (jax 0.11.2): 6.1B parameters, 68.8 GiB of state on the host,
36.9 GiB on the device, 5.0 s a step, loss 5.84 → 2.90 in 15 steps; 36 layers are 7.9B, 88.4 GiB on
the host, 47.4 GiB on the device, 7.0 s.
"""

import ml_collections

from helios_jax.configs import bench_memory


def get_config() -> ml_collections.ConfigDict:
    config = bench_memory.get_config()
    config.model.update(num_layers=28, mlp_dim=14_336)
    config.train.update(num_steps=7)
    config.memory.update(policy='fp8_offload', optimizer='host', parameters='host')
    return config
