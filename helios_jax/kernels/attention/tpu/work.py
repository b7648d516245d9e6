"""Which blocks of queries meet which blocks of keys: the list that the kernels' grid walks.

Visibility depends on segments and positions alone, so a block is summarised by the range of
(segment, position) that it holds, in lexicographic order. Two blocks whose ranges cannot meet are
not listed: they are neither fetched nor stepped over. The test is exact for rows that are sorted,
as packed rows and contiguous pieces of them are, and only ever too generous for others.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SEGMENT, POSITION = 0, 1  # rows of `marks`, float32 [B 2 T]: integers, exact up to 2^24
FAR = 1e9  # beyond every segment and position: padding keys
NOBODY = -1.0  # the segment of queries that are padding; that of keys is 0

# Flags of an item.
FULL, FIRST_Q, LAST_Q, FIRST_K, LAST_K = (1 << bit for bit in range(16, 21))


class Blocks(NamedTuple):
    """How a kernel cuts its work, in tokens.

    `width` is of one product: keys in the forward kernel, query rows of all heads in the backward.
    """

    q: int
    k: int
    part: int  # of keys: blocks that need a mask are computed in parts, those that see nothing not
    width: int


class Work(NamedTuple):
    """`count` items, ordered by row, query block, key block. Arrays are int32 [count or more].

    They lie in SMEM, 1 MiB of it, so that numbers of blocks share words.
    """

    queries: Array  # row of the batch << 16 | block of queries
    keys: Array  # block of keys << 16 | the one that was begun last
    writes: Array  # the block of keys that is finished next
    parts: Array  # first part | end part << 8 | flags
    count: Any  # int, or int32 scalar


class Ranges(NamedTuple):
    """Of the tokens of each block that are not padding. Arrays [B blocks]."""

    low: tuple[Any, Any]  # least (segment, position)
    high: tuple[Any, Any]
    positions: tuple[Any, Any]  # least and greatest of all
    whole: Any  # bool: no padding, one segment


def ranges(marks: Any, block: int) -> Ranges:
    xp = np if isinstance(marks, np.ndarray) else jnp
    segments, positions = (
        marks[:, row].reshape(len(marks), -1, block) for row in (SEGMENT, POSITION)
    )
    live = segments > 0
    low = xp.min(xp.where(live, segments, FAR), axis=2)
    high = xp.max(xp.where(live, segments, -FAR), axis=2)
    least, most = xp.where(live, positions, FAR), xp.where(live, positions, -FAR)
    return Ranges(
        (low, xp.min(xp.where(segments == low[..., None], positions, FAR), axis=2)),
        (high, xp.max(xp.where(segments == high[..., None], positions, -FAR), axis=2)),
        (xp.min(least, axis=2), xp.max(most, axis=2)),
        xp.all(live, axis=2) & (low == high),
    )


def not_after(a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    """a ≤ b, lexicographically."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))


def meet(q: Ranges, k: Ranges, window: int) -> tuple[Any, Any]:
    """(may some query see some key, does every query see every key): bool [B nq nk]."""
    q = jax.tree.map(lambda x: x[:, :, None], q)
    k = jax.tree.map(lambda x: x[:, None], k)
    oldest = q.low[1] - (window - 1) if window else -FAR
    # An empty block's low is FAR, and its high −FAR: one of the two comparisons fails.
    some = not_after(k.low, q.high) & not_after((q.low[0], oldest), k.high)
    every = q.whole & k.whole & (q.low[0] == k.low[0]) & (k.positions[1] <= q.positions[0])
    if window:
        every &= q.positions[1] - k.positions[0] < window
    return some, every


def make(q_marks: Any, k_marks: Any, blocks: Blocks, window: int, ordered: bool) -> Work:
    """Lists the pairs of blocks that meet. Marks in NumPy give a list known at compile time.

    `ordered`: queries and keys are the same tokens, and none sees a later one.

    Each block of queries and of keys is listed once at least, with no parts to compute if it meets
    nothing, so that the kernels write all of their outputs.
    """
    xp = np if isinstance(q_marks, np.ndarray) else jnp
    queries = ranges(q_marks, blocks.q)
    _, every = meet(queries, ranges(k_marks, blocks.k), window)
    some, _ = meet(queries, ranges(k_marks, blocks.part), window)
    B, nq, nk = every.shape
    some = some.reshape(B, nq, nk, -1)
    num_parts = some.shape[-1]
    active = some.any(-1)
    i, j = np.arange(nq)[None, :, None], np.arange(nk)[None, None]
    visit = active | (~active.any(2, keepdims=True) & (j == 0))
    visit = visit | (~visit.any(1, keepdims=True) & (i == nq - 1))

    first_part = xp.argmax(some, axis=-1)
    end_part = xp.where(active, num_parts - xp.argmax(some[..., ::-1], axis=-1), first_part)
    parts = first_part | end_part << 8
    flags = (
        (FULL, every),
        (FIRST_Q, visit & (xp.cumsum(visit, 2) == 1)),
        (LAST_Q, visit & (xp.cumsum(visit[:, :, ::-1], 2)[:, :, ::-1] == 1)),
        (FIRST_K, visit & (xp.cumsum(visit, 1) == 1)),
        (LAST_K, visit & (xp.cumsum(visit[:, ::-1], 1)[:, ::-1] == 1)),
    )
    for flag, where in flags:
        parts = parts | xp.where(where, flag, 0)

    possible = B * nq * nk
    if ordered:
        ends = (np.arange(nq) + 1) * blocks.q
        possible = B * int(np.minimum(-(-ends // blocks.k), nk).sum() + nk)
    size = {} if xp is np else {'size': min(possible, B * nq * nk), 'fill_value': 0}
    (items,) = xp.nonzero(visit.reshape(-1), **size)
    count = len(items) if xp is np else visit.sum(dtype=jnp.int32)
    queries, keys = items // nk, items % nk
    parts = parts.reshape(-1)[items]
    index = xp.arange(len(items))
    # A row of the batch begins all its blocks of keys in its own items, and finishes them there.
    begun = xp.where(parts & FIRST_K, index, 0)
    finished = xp.where((parts & LAST_K != 0) & (index < count), index, count - 1)
    if xp is np:
        begun = np.maximum.accumulate(begun)
        finished = np.minimum.accumulate(finished[::-1])[::-1]
    else:
        begun, finished = jax.lax.cummax(begun), jax.lax.cummin(finished, reverse=True)
    word = functools.partial(jnp.asarray, dtype=jnp.int32)
    return Work(
        queries=word(queries // nq << 16 | queries % nq),
        keys=word(keys << 16 | keys[begun]),
        writes=word(keys[finished]),
        parts=word(parts),
        count=count,
    )
