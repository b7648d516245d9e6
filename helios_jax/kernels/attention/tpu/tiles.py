"""What both kernels do to a tile, and where the tiles of a work item lie.

Arrays are [B heads T H], tokens along the sublanes, as projections make them, and blocks are turned
in registers where that is wanted: to rotate, so that the halves that mix are whole registers, and
as the matmul units like their operands.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from helios_jax.kernels.attention.tpu.work import Blocks

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that a row that has seen nothing yet has no infinity to subtract
LANES = 128
MARKS = 8  # rows of the tables below the rotation's: segment, position, and padding to a tile


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Float32 product of two matrices over one axis of each."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def rotate(x: Array, table: Any, sign: int = 1) -> Array:
    """Rotates float32 [H n] by the table's first H rows, cosines over sines; sign −1: back."""
    H = len(x)
    low, high = x[: H // 2], x[H // 2 :]
    cos, sin = table[: H // 2], sign * table[H // 2 : H]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin])


def column(row: Array) -> Array:
    """[1 n] → [n LANES], each value along its own sublane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def spread(x: Array, width: int) -> Array:
    """[n LANES] of equal lanes → [n width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def visible(q: tuple[Array, Array], k: tuple[Array, Array], window: int, segmented: bool) -> Array:
    """Which logits count, of (segments, positions) that broadcast to the logits' shape.

    Padding needs no test of its own: its keys lie beyond every position, and the segments of its
    queries are those of no key.
    """
    seen = k[1] <= q[1]
    if segmented:
        seen &= k[0] == q[0]
    return seen & (k[1] > q[1] - window) if window else seen


def capped(logits: Array, softcap: float) -> Array:
    """Soft cap of base-2 logits; `softcap` is in natural units."""
    limit = softcap * LOG2E
    return limit * jnp.tanh(logits * (1 / limit)) if softcap else logits


class Specs(NamedTuple):
    """Blocks of [B K G T H], [B K G T], [B K S H] and [B H+MARKS T or S], by the work list."""

    queries: pl.BlockSpec
    rows: pl.BlockSpec
    keys: pl.BlockSpec
    begun_keys: pl.BlockSpec
    finished_keys: pl.BlockSpec
    query_table: pl.BlockSpec
    key_table: pl.BlockSpec


def high(word: Any) -> Any:
    return jax.lax.shift_right_logical(word, 16)


def low(word: Any) -> Any:
    return word & 0xFFFF


def specs(q: Array, blocks: Blocks, cached: bool) -> Specs:
    """Index maps take (key head, item, *prefetched), the first three of these the work's arrays.

    `cached`: the kernel keeps what it makes of a block of keys, so that it is fetched only once.
    """
    G, _, H = q.shape[2:]

    def queries(head: Any, item: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), head, 0, low(queries[item]), 0

    def statistics(head: Any, item: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), head, 0, low(queries[item])

    def query_table(head: Any, item: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), 0, low(queries[item])

    def keys(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), head, high(keys[item]), 0

    def begun(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), head, low(keys[item]), 0

    def finished(head: Any, item: Any, queries: Any, keys: Any, writes: Any, *_: Any) -> Any:
        return high(queries[item]), head, writes[item], 0

    def key_table(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), 0, high(keys[item])

    key_block = (None, None, blocks.k, H)
    return Specs(
        pl.BlockSpec((None, None, G, blocks.q, H), queries),
        pl.BlockSpec((None, None, G, blocks.q), statistics),
        pl.BlockSpec(key_block, keys),
        pl.BlockSpec(key_block, begun if cached else keys),
        pl.BlockSpec(key_block, finished),
        pl.BlockSpec((None, H + MARKS, blocks.q), query_table),
        pl.BlockSpec((None, H + MARKS, blocks.k), key_table),
    )
