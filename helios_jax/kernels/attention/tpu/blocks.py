"""How large the kernels' blocks are, per TPU generation, pass and head size.

`helios bench attention --tune` searches these by the compiler's schedules.
"""

import jax

from helios_jax.kernels.attention.tpu.work import Blocks

MIB = 2**20
# VMEM of a core that a kernel may take, of 128 MiB or (v5p, tpu7x) 64.
VMEM = {'v5e': 100 * MIB, 'v5p': 56 * MIB, 'v6e': 100 * MIB, 'tpu7x': 56 * MIB}
KINDS = {
    'TPU v5 lite': 'v5e',
    'TPU v5': 'v5p',
    'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e',
    'TPU7x': 'tpu7x',
}
DEFAULT = 'v5p'  # the smaller VMEM
MOST_KEYS = 4096  # of a block; a grid step costs some hundred cycles


def generation() -> str:
    """Of the mesh that we trace for, or of this machine's devices; `DEFAULT` off TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device else jax.devices()[0].device_kind
    return KINDS.get(kind, DEFAULT)


def choose(generation: str, G: int, H: int, T: int, S: int, wide: bool, backward: bool) -> Blocks:
    """Blocks for G heads a group of size H, T queries and S keys; `wide` operands are float32."""
    large = generation in ('v6e', 'tpu7x')  # matmul units of 256 by 256
    rows, run = 2048 if large and backward else 1024, 1024
    if wide or H > 128:
        rows, run = rows // 2, run // 2
    q = 128
    while q * 2 * G <= rows and q < T:
        q *= 2
    part = 256 if S > 128 else 128
    k = -(-S // -(-S // MOST_KEYS) // part) * part
    width = (2048 if large else 256) if backward else 512
    return Blocks(q, k, part, run // part, width)
