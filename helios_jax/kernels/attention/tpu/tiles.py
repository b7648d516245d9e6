"""What both kernels do to a tile, and where the tiles of a work item lie.

Arrays are [B heads T H], tokens along the sublanes, as projections make them, and blocks are turned
in registers where that is wanted: to rotate, so that the halves that mix are whole registers, and
as the matmul units like their operands.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels.attention.tpu.work import Blocks, spans

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


def diagonal() -> Array:
    """bool [LANES LANES]. Sums over it turn rows into columns, which costs less than transposes."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in (0, 1))
    return rows == columns


def column(row: Array) -> Array:
    """[1 n] → [n LANES], each value along its own sublane."""
    squares = (
        jnp.where(diagonal(), row[:, i : i + LANES], 0) for i in range(0, row.shape[1], LANES)
    )
    columns = [jnp.sum(square, axis=1, keepdims=True) for square in squares]
    return jnp.broadcast_to(jnp.concatenate(columns), (row.shape[1], LANES))


def spread(x: Array, width: int) -> Array:
    """[n LANES] of equal lanes → [n width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def swapped(x: Array) -> Array:
    """[n H] with the halves of H exchanged."""
    H = x.shape[1]
    if H != LANES:
        return jnp.concatenate([x[:, H // 2 :], x[:, : H // 2]], axis=1)
    if x.dtype != jnp.bfloat16:
        return pltpu.roll(x, H // 2, 1)
    pairs = pltpu.bitcast(x, jnp.uint32)  # two rows to a register: half of the rolls
    return pltpu.bitcast(pltpu.roll(pairs, H // 2, 1), jnp.bfloat16)


def inverse(x: Array, steps: int) -> Array:
    """1 / x of positive float32: two of Newton's steps are exact, and cost less than a division."""
    guess = pl.reciprocal(x, approx=True)
    for _ in range(steps):
        guess = guess * (2 - x * guess)
    return guess


def compact(x: Array) -> Array:
    """[n LANES] of equal lanes → [1 n]: the inverse of `column`."""
    squares = (jnp.where(diagonal(), x[i : i + LANES], 0) for i in range(0, len(x), LANES))
    return jnp.concatenate([jnp.sum(s, axis=0, keepdims=True) for s in squares], axis=1)


def walk(word: Any, blocks: Blocks, attend: Callable[[Any, int, bool], None]) -> None:
    """Calls `attend(first key of the block, number of keys, masked)` over an item's parts."""
    at = spans(word)
    log2 = blocks.run.bit_length() - 1
    runs = jax.lax.shift_right_logical(at.mixed - at.full, log2)

    def keys(part: Array) -> Array:
        return pl.multiple_of(part * blocks.part, blocks.part)

    def run(i: Array, _: None) -> None:
        attend(keys(at.full + i * blocks.run), blocks.run * blocks.part, False)

    def masked(i: Array, _: None) -> None:
        part = jnp.where(at.first + i < at.full, at.first + i, at.mixed + i - (at.full - at.first))
        attend(keys(part), blocks.part, True)

    jax.lax.fori_loop(0, runs, run, None)
    for size in (1 << i for i in reversed(range(log2))):  # what is left of a run, by halves

        @pl.when((at.mixed - at.full) & size != 0)
        def _(size: int = size) -> None:
            left = (at.mixed - at.full) & (2 * size - 1)
            attend(keys(at.mixed - left), size * blocks.part, False)

    jax.lax.fori_loop(0, (at.full - at.first) + (at.end - at.mixed), masked, None)


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
    """Blocks of queries [B K G T H] and [B K G T], keys [B K S H] and [B K 1 S], tables."""

    queries: pl.BlockSpec
    rows: pl.BlockSpec
    keys: pl.BlockSpec
    begun_keys: pl.BlockSpec
    begun_rows: pl.BlockSpec
    finished_keys: pl.BlockSpec
    query_table: pl.BlockSpec
    upright_table: pl.BlockSpec
    query_marks: pl.BlockSpec
    key_table: pl.BlockSpec
    begun_table: pl.BlockSpec


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

    def upright_table(head: Any, item: Any, queries: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), low(queries[item]), 0

    def keys(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), head, high(keys[item]), 0

    def begun(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), head, low(keys[item]), 0

    def begun_rows(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), head, 0, low(keys[item])

    def finished(head: Any, item: Any, queries: Any, keys: Any, writes: Any, *_: Any) -> Any:
        return high(queries[item]), head, writes[item], 0

    def key_table(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), 0, high(keys[item])

    def begun_table(head: Any, item: Any, queries: Any, keys: Any, *_: Any) -> tuple[Any, ...]:
        return high(queries[item]), 0, low(keys[item])

    key_block = (None, None, blocks.k, H)
    return Specs(
        pl.BlockSpec((None, None, G, blocks.q, H), queries),
        pl.BlockSpec((None, None, G, blocks.q), statistics),
        pl.BlockSpec(key_block, keys),
        pl.BlockSpec(key_block, begun if cached else keys),
        pl.BlockSpec((None, None, 1, blocks.k), begun_rows),
        pl.BlockSpec(key_block, finished),
        pl.BlockSpec((None, H + MARKS, blocks.q), query_table),
        pl.BlockSpec((None, blocks.q, H), upright_table),
        pl.BlockSpec((None, MARKS, blocks.q), query_table),
        pl.BlockSpec((None, H + MARKS, blocks.k), key_table),
        pl.BlockSpec((None, H + MARKS, blocks.k), begun_table if cached else key_table),
    )
