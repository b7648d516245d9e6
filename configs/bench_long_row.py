"""The longest row that one 80 GB accelerator trains 2.9 billion parameters on: 262,144 tokens.

export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
helios bench train --config=bench_long_row --kinds=convex --packings=concatenate \
    --warmup_steps=0 --profiled_steps=0
helios bench train --config=bench_long_row --kinds=convex --packings=concatenate \
    --warmup_steps=0 --profiled_steps=0 --config.data.row_length=77824 \
    --config.memory.policy=full --config.memory.backward_parts=1 \
    --config.memory.optimizer=device --config.memory.parameters=device

One H100 (jax 0.11.2): 58.0 GiB on the device, 91 s a step, with the state on the host and backward
in four parts; all on the device, rows of 77,824 tokens take 69.4 GiB and 9.5 s.
"""

import ml_collections

from helios_jax.configs import bench_memory


def get_config() -> ml_collections.ConfigDict:
    config = bench_memory.get_config()
    config.data.update(row_length=262_144)
    config.train.update(num_steps=1, batch_rows=1)
    config.memory.update(
        policy='fp8_offload', backward_parts=4, optimizer='host', parameters='host'
    )
    return config
