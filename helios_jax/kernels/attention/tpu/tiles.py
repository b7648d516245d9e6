"""Operations of both kernels on tiles.

Arrays are [B heads T H], tokens along the sublanes, as projections make them. Kernels transpose
blocks in registers where that helps: to rotate, so that the halves that mix are whole registers,
and to give the matmul units their operands as they like them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels.attention.tpu.specs import Static
from helios_jax.kernels.attention.tpu.work import Blocks, spans
from helios_jax.kernels.cost import estimate

Ref = Any  # a reference to a block in VMEM or SMEM, which pallas has no public type for

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that a row that has seen nothing yet has no infinity to subtract
LANES = 128
RECIPROCAL = getattr(pltpu, 'reciprocal', None) or pl.reciprocal  # jax 0.12 moved it


def cost(
    queries: tuple[int, ...], num_keys: int, window: int, products: int, arrays: Any
) -> pl.CostEstimate:
    """Estimates a kernel (kernels/cost.py), as if each row were one document.

    Args:
      queries: B, K, G, T and H.
      products: matmuls of queries, or of what belongs to them, with keys.
      arrays: all that it reads and writes.
    """
    *batch, H = queries
    pairs = math.prod(batch) * min(num_keys // 2, window or num_keys)
    return estimate(2 * products * pairs * H, arrays, pairs)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Multiplies two matrices over one axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def rotate(x: Array, table: Any, sign: int = 1) -> Array:
    """Rotates float32 [H n] by the table's first H rows, cosines over sines; sign −1: back."""
    H = len(x)
    low, high = x[: H // 2], x[H // 2 :]
    cos, sin = table[: H // 2], sign * table[H // 2 : H]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin])


def diagonal() -> Array:
    """Identity, bool [LANES LANES]; sums over it turn rows to columns, cheaper than transposes."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in (0, 1))
    return rows == columns


def column(row: Array) -> Array:
    """Turns [1 n] into [n LANES], each value along its own sublane."""
    squares = (
        jnp.where(diagonal(), row[:, i : i + LANES], 0) for i in range(0, row.shape[1], LANES)
    )
    columns = [jnp.sum(square, axis=1, keepdims=True) for square in squares]
    return jnp.broadcast_to(jnp.concatenate(columns), (row.shape[1], LANES))


def spread(x: Array, width: int) -> Array:
    """Widens [n LANES] of equal lanes to [n width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def swapped(x: Array) -> Array:
    """Exchanges the halves of H in [n H]."""
    H = x.shape[1]
    if H != LANES:
        return jnp.concatenate([x[:, H // 2 :], x[:, : H // 2]], axis=1)
    if x.dtype != jnp.bfloat16:
        return pltpu.roll(x, H // 2, 1)
    pairs = pltpu.bitcast(x, jnp.uint32)  # two rows to a register: half of the rolls
    return pltpu.bitcast(pltpu.roll(pairs, H // 2, 1), jnp.bfloat16)


def inverse(x: Array, steps: int) -> Array:
    """Inverts positive float32: two of Newton's steps are exact, and cost less than a division."""
    guess = RECIPROCAL(x, approx=True)
    for _ in range(steps):
        guess = guess * (2 - x * guess)
    return guess


def compact(x: Array) -> Array:
    """Turns [n LANES] of equal lanes into [1 n]: the inverse of `column`."""
    squares = (jnp.where(diagonal(), x[i : i + LANES], 0) for i in range(0, len(x), LANES))
    return jnp.concatenate([jnp.sum(s, axis=0, keepdims=True) for s in squares], axis=1)


def walk(word: Any, blocks: Blocks, attend: Callable[[Any, int, bool], None]) -> None:
    """Calls `attend(first key of the block, number of keys, masked)` over an item's strips."""
    at = spans(word)
    log2 = blocks.run.bit_length() - 1
    runs = jax.lax.shift_right_logical(at.mixed - at.full, log2)

    def keys(strip: Array) -> Array:
        return pl.multiple_of(strip * blocks.strip, blocks.strip)

    def run(i: Array, _: None) -> None:
        attend(keys(at.full + i * blocks.run), blocks.run * blocks.strip, False)

    def masked(i: Array, _: None) -> None:
        strip = jnp.where(at.first + i < at.full, at.first + i, at.mixed + i - (at.full - at.first))
        attend(keys(strip), blocks.strip, True)

    jax.lax.fori_loop(0, runs, run, None)
    for size in (1 << i for i in reversed(range(log2))):  # what is left of a run, by halves

        @pl.when((at.mixed - at.full) & size != 0)
        def _(size: int = size) -> None:
            left = (at.mixed - at.full) & (2 * size - 1)
            attend(keys(at.mixed - left), size * blocks.strip, False)

    jax.lax.fori_loop(0, (at.full - at.first) + (at.end - at.mixed), masked, None)


def visible(q: tuple[Array, Array], k: tuple[Array, Array], static: Static) -> Array:
    """Mask of the logits that count; (segments, positions) broadcast to the logits' shape.

    Padding needs no test of its own: its keys lie after every position, and the segments of its
    queries are those of no key.
    """
    seen = k[1] <= q[1]
    if static.segmented:
        seen &= k[0] == q[0]
    return seen & (k[1] > q[1] - static.window) if static.window else seen


def capped(logits: Array, softcap: float) -> Array:
    """Caps base-2 logits softly; `softcap` is in natural units."""
    limit = softcap * LOG2E
    return limit * jnp.tanh(logits * (1 / limit)) if softcap else logits
