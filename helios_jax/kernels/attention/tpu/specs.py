"""Static settings of a kernel, and the block of each array that a work item needs.

Arrays are [B heads T H]; work.py tells the life of a work item.
"""

from typing import Any, NamedTuple

import jax
from jax import Array
from jax.experimental import pallas as pl

from helios_jax.kernels.attention.tpu.work import Blocks, Items

MARKS = 8  # rows of the tables below the rotation's: segment, position, and padding to a tile


class Static(NamedTuple):
    """Static settings of one kernel."""

    blocks: Blocks
    window: int
    softcap: float
    segmented: bool  # there is more than one segment, or padding between tokens
    residuals: str = ''  # form in which forward keeps q, k and v: '' | fp8 | int8
    cached: bool = True  # all rotated keys of a head stay in VMEM, and are fetched only once


class Specs(NamedTuple):
    """Block specs of the arrays: the block of each that a work item needs."""

    queries: pl.BlockSpec  # [B K G T H]
    rows: pl.BlockSpec  # [B K G T]
    begun_keys: pl.BlockSpec  # [B K S H], of the block of keys that was begun last
    begun_rows: pl.BlockSpec  # [B K 1 S], of the same
    finished_keys: pl.BlockSpec  # [B K S H], of the block that ends next
    query_table: pl.BlockSpec  # [B H+MARKS T]
    upright_table: pl.BlockSpec  # [B T H]
    query_marks: pl.BlockSpec  # [B MARKS T]
    key_table: pl.BlockSpec  # [B H+MARKS S], of the item's own block of keys
    begun_table: pl.BlockSpec  # the same, of the block that was begun last


def high(word: Any) -> Any:
    return jax.lax.shift_right_logical(word, 16)


def low(word: Any) -> Any:
    return word & 0xFFFF


def specs(q: Array, static: Static) -> Specs:
    """Makes index maps of (key head, index of the item, the items' words, other prefetched)."""
    (G, _, H), blocks, cached = q.shape[2:], static.blocks, static.cached

    def queries(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), head, 0, low(items.queries[i]), 0

    def statistics(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), head, 0, low(items.queries[i])

    def query_table(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), 0, low(items.queries[i])

    def upright_table(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), low(items.queries[i]), 0

    def keys(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), head, high(items.keys[i]), 0

    def begun(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), head, low(items.keys[i]), 0

    def begun_rows(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), head, 0, low(items.keys[i])

    def finished(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), head, items.writes[i], 0

    def key_table(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), 0, high(items.keys[i])

    def begun_table(head: Any, i: Any, items: Items, _: Any) -> tuple[Any, ...]:
        return high(items.queries[i]), 0, low(items.keys[i])

    key_block = (None, None, blocks.k, H)
    return Specs(
        pl.BlockSpec((None, None, G, blocks.q, H), queries),
        pl.BlockSpec((None, None, G, blocks.q), statistics),
        pl.BlockSpec(key_block, begun if cached else keys),
        pl.BlockSpec((None, None, 1, blocks.k), begun_rows),
        pl.BlockSpec(key_block, finished),
        pl.BlockSpec((None, H + MARKS, blocks.q), query_table),
        pl.BlockSpec((None, blocks.q, H), upright_table),
        pl.BlockSpec((None, MARKS, blocks.q), query_table),
        pl.BlockSpec((None, H + MARKS, blocks.k), key_table),
        pl.BlockSpec((None, H + MARKS, blocks.k), begun_table if cached else key_table),
    )
