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

# Flags of an item, above the four numbers of parts.
PART_BITS = 6
FIRST_Q, LAST_Q, FIRST_K, LAST_K = (1 << bit for bit in range(24, 28))


class Blocks(NamedTuple):
    """How a kernel cuts its work, in tokens."""

    q: int  # of each head
    k: int  # fetched at once: a multiple of `part`, fewer than 64 of them
    part: int  # what sees nothing is left out, and what needs a mask is masked, by parts
    run: int  # parts computed at once where nothing needs a mask
    width: int  # of one product: keys in the forward kernel, rows of all heads in the backward


class Work(NamedTuple):
    """`count` items, ordered by row, query block, key block. Arrays are int32 [count or more].

    They lie in SMEM, 1 MiB of it, so that numbers of blocks share words.
    """

    queries: Array  # row of the batch << 16 | block of queries
    keys: Array  # block of keys << 16 | the one that was begun last
    writes: Array  # the block of keys that is finished next
    parts: Array  # `Spans` of parts of the block of keys, `PART_BITS` each | flags
    count: Any  # int, or int32 scalar


class Spans(NamedTuple):
    """Parts that some query of the block sees: [first, end), and every query: [full, mixed)."""

    first: Any
    full: Any
    mixed: Any
    end: Any


def spans(word: Any) -> Spans:
    """Of an element of `Work.parts`."""
    return Spans(*(word >> PART_BITS * i & (1 << PART_BITS) - 1 for i in range(4)))


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
    some, every = meet(ranges(q_marks, blocks.q), ranges(k_marks, blocks.part), window)
    (B, nq, _), num_parts = some.shape, blocks.k // blocks.part
    some, every = (x.reshape(B, nq, -1, num_parts) for x in (some, every))
    active, nk = some.any(-1), some.shape[2]
    i, j = np.arange(nq)[None, :, None], np.arange(nk)[None, None]
    visit = active | (~active.any(2, keepdims=True) & (j == 0))
    visit = visit | (~visit.any(1, keepdims=True) & (i == nq - 1))

    first = xp.argmax(some, axis=-1)
    end = xp.where(active, num_parts - xp.argmax(some[..., ::-1], axis=-1), first)
    # Every query sees a contiguous span of parts of sorted rows; the first one of others is taken.
    full = xp.where(every.any(-1), xp.argmax(every, axis=-1), end)
    after = ~every & (np.arange(num_parts)[None, None, None] >= full[..., None])
    mixed = xp.where(after.any(-1), xp.argmax(after, axis=-1), num_parts)
    mixed = xp.where(full < end, mixed, end)
    parts = first | full << PART_BITS | mixed << 2 * PART_BITS | end << 3 * PART_BITS
    flags = (
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
