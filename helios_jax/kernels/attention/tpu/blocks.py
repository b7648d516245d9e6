"""How large the kernels' blocks are: by a table, per TPU generation, pass, head size and length.

`helios bench attention --tune` writes the table, from the compiler's schedules.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from helios_jax import chips
from helios_jax.kernels.attention.tpu.work import Blocks

INTERPRETED = 'v5p'  # what a kernel is laid out for where there is no TPU: the smaller VMEM
TABLE = Path(__file__).with_name('blocks.json')


class Shape(NamedTuple):
    """Blocks as the table has them, for any number of heads and tokens."""

    rows: int  # queries × heads of a group
    k: int
    strip: int
    run: int
    width: int


def generation() -> str:
    """The chip of the mesh that we trace for, or of this machine; `INTERPRETED` off TPU.

    Raises:
      NotImplementedError: a TPU whose VMEM chips.py does not know.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if device.platform != 'tpu':
        return INTERPRETED
    chip = chips.find(device.device_kind)
    if chip is None or not chip.kernel_vmem_bytes:
        raise NotImplementedError(
            f'does not know the VMEM of {device.device_kind!r}: add its row to helios_jax/chips.py.'
        )
    return chip.name


def choose(generation: str, G: int, H: int, T: int, S: int, wide: bool, backward: bool) -> Blocks:
    """Blocks for G heads a group of size H, T queries and S keys; `wide` operands are float32."""
    return fit(shape(generation, H, T, wide, backward), G, T, S)


def shape(generation: str, H: int, T: int, wide: bool, backward: bool) -> Shape:
    """The table's, from the nearest length that is no longer; the default where it knows no H."""
    known = tuned().get(generation, {}).get('backward' if backward else 'forward', {})
    lengths = {} if wide else known.get(str(H), {})
    if not lengths:
        return default(H, wide, backward)
    length = max((int(n) for n in lengths if int(n) <= T), default=min(map(int, lengths)))
    return Shape(*lengths[str(length)])


@functools.cache
def tuned() -> dict[str, Any]:
    """generation → pass → head size → length, from which on → `Shape`."""
    return json.loads(TABLE.read_text())


def default(H: int, wide: bool, backward: bool) -> Shape:
    scale = 2 if wide or H > 128 else 1
    return Shape(2048 // scale, 4096 // scale, 512, 2 // scale, 256 if backward else 512)


def fit(shape: Shape, G: int, T: int, S: int) -> Blocks:
    """The nearest blocks for a problem, none much larger than it."""
    q = strip = 128
    while q * 2 * G <= shape.rows and q < T:
        q *= 2
    while strip < min(shape.strip, S):
        strip *= 2
    k = -(-S // -(-S // shape.k) // strip) * strip
    run = shape.run
    while run * strip > k:
        run //= 2
    return Blocks(q, k, strip, run, shape.width)


def working_set(
    blocks: Blocks, G: int, H: int, itemsize: int, backward: bool, in_chunks: bool = False
) -> int:
    """Upper bound on a kernel's VMEM in bytes, without the cache of all keys.

    in_chunks: dq comes in, and goes out, in float32 for every chunk of the keys.
    """
    lanes, rows, arrays = max(H, 128), G * blocks.q, 4 if backward else 2
    copies = 2 * arrays * lanes * itemsize * (rows + blocks.k)  # blocks of inputs and outputs
    tables = 2 * 4 * (lanes + 16) * (blocks.q + blocks.k)
    # In chunks the compiler takes 5 MiB more for 2,048 rows of 128: 20 bytes a value.
    state = rows * lanes * (2 * itemsize + (32 if in_chunks else 12))
    chunk = min(blocks.width, rows) if backward else rows
    keys = blocks.run * blocks.strip if backward else min(blocks.width, blocks.run * blocks.strip)
    return copies + tables + state + 4 * chunk * keys
