"""Block sizes of the kernels, from a table by TPU generation, pass, head size and length.

`helios bench attention --tune` writes the table, from the compiler's schedules.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from helios_jax import chips
from helios_jax.kernels.attention.tpu.work import Blocks

INTERPRETED = 'v5p'  # chip to lay a kernel out for without a TPU: the smaller VMEM
TABLE = Path(__file__).with_name('blocks.json')


class Shape(NamedTuple):
    """Block sizes in the table, for any number of heads and tokens."""

    rows: int  # queries × heads of a group
    k: int
    strip: int
    run: int
    width: int


def generation() -> str:
    """Name of the chip that we trace for: the mesh's or this machine's; `INTERPRETED` off TPU.

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
    """Chooses blocks for groups of G heads of size H, T queries, S keys; `wide` is float32."""
    return fit(shape(generation, H, T, wide, backward), G, T, S)


def shape(generation: str, H: int, T: int, wide: bool, backward: bool) -> Shape:
    """Looks up the shape at the nearest length that is no longer; the default for an unknown H."""
    known = tuned().get(generation, {}).get('backward' if backward else 'forward', {})
    lengths = {} if wide else known.get(str(H), {})
    if not lengths:
        return default(H, wide, backward)
    length = max((int(n) for n in lengths if int(n) <= T), default=min(map(int, lengths)))
    return Shape(*lengths[str(length)])


@functools.cache
def tuned() -> dict[str, Any]:
    """Reads the table: generation → pass → head size → least length → fields of `Shape`."""
    return json.loads(TABLE.read_text())


def default(H: int, wide: bool, backward: bool) -> Shape:
    scale = 2 if wide or H > 128 else 1
    return Shape(2048 // scale, 4096 // scale, 512, 2 // scale, 256 if backward else 512)


def fit(shape: Shape, G: int, T: int, S: int) -> Blocks:
    """Fits a shape to a problem: the nearest blocks, none much larger than the problem."""
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

    in_chunks: True if keys come in chunks, so that dq is read and written in float32 for each.
    """
    lanes, rows, arrays = max(H, 128), G * blocks.q, 4 if backward else 2
    copies = 2 * arrays * lanes * itemsize * (rows + blocks.k)  # blocks of inputs and outputs
    tables = 2 * 4 * (lanes + 16) * (blocks.q + blocks.k)
    # In chunks the compiler takes 5 MiB more for 2,048 rows of 128: 20 bytes a value.
    state = rows * lanes * (2 * itemsize + (32 if in_chunks else 12))
    chunk = min(blocks.width, rows) if backward else rows
    keys = blocks.run * blocks.strip if backward else min(blocks.width, blocks.run * blocks.strip)
    return copies + tables + state + 4 * chunk * keys
