"""Lists which blocks of queries meet which blocks of keys; the kernels' grid walks the list.

Visibility depends on segments and positions alone, so a block is summarised by the range of
(segment, position) that it holds, in lexicographic order. Two blocks whose ranges cannot meet are
not listed: they are neither fetched nor stepped over. The test is exact for rows that are sorted,
as packed rows and contiguous pieces of them are, and only ever too generous for others.

The life of a work item
-----------------------
Both kernels have the grid (K, count): for each key head they walk the same list, by row of the
batch, then block of queries, then block of keys. An item is four words of int32. They lie in SMEM,
1 MiB of it, so several numbers share a word. The index maps (tiles.py) read them before a step, to
say which blocks it needs; the kernel reads them during the step, to know what to do.

    bit        31                16 15                 0
    queries    [ row of the batch  |  block of queries  ]
    keys       [   block of keys   | the one last begun ]
    writes     [    block of keys that ends next        ]

    bit        31 28   27     26     25     24   23  18 17  12 11   6 5    0
    strips     [  0 |LAST_K|FIRST_K|LAST_Q|FIRST_Q| end  |mixed | full |first ]

A block of keys is cut into strips of `Blocks.strip` keys, and `strips` says what becomes of each:

    0          first          full              mixed          end         k / strip
    |  skipped   |   masked     |  without a mask  |   masked    |  skipped   |

A step goes:

 1. Pallas fetches the blocks of q and of k, v that the index maps name, where they are not those of
    the step before. Rotated keys stay in VMEM for later queries, so that a block of keys is needed
    only where it begins: its map follows the low half of `keys`. (Only if a head's keys do not all
    fit, the forward kernel follows the high half and fetches them for each block of queries.)
 2. FIRST_Q, the first item of a block of queries: q is rotated and scaled, its sums are cleared.
    FIRST_K, the first item of a block of keys in this row: k is rotated and kept; in the backward
    kernel dk and dv are cleared.
 3. `tiles.walk` computes the strips of [full, mixed) up to `Blocks.run` at once, and the others of
    [first, end) one by one, with a mask.
 4. LAST_Q: the forward kernel divides by the sum and gives out and log-sum-exp; the backward kernel
    turns dq back. LAST_K: the backward kernel turns dk back, and gives dk and dv.
 5. Pallas writes an output block to HBM when the next item names another. Those of dk and dv follow
    `writes`, so that they stay until their last item has filled them; what the forward kernel keeps
    of k and v follows the low half of `keys`, as it is made where a block begins.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SEGMENT, POSITION = 0, 1  # rows of `marks`, float32 [B 2 T]: integers, exact up to 2^24
FAR = 1e9  # beyond every segment and position: padding keys
NOBODY = -1.0  # the segment of queries that are padding; that of keys is 0

# Flags of an item, above its four numbers of strips.
STRIP_BITS = 6
FIRST_Q, LAST_Q, FIRST_K, LAST_K = (1 << bit for bit in range(24, 28))


class Blocks(NamedTuple):
    """Sizes of the blocks that a kernel cuts its work into, in tokens."""

    q: int  # queries of each head
    k: int  # fetched at once: a multiple of `strip`, fewer than 64 of them
    strip: int  # granularity at which keys are skipped or masked
    run: int  # strips computed at once where nothing needs a mask
    width: int  # size of one product: keys in forward, rows of all heads in backward


class Items(NamedTuple):
    """The words of the items, int32 [count or more] each; the module's docstring draws them."""

    queries: Any  # row of the batch << 16 | block of queries
    keys: Any  # block of keys << 16 | the one that was begun last
    writes: Any  # the block of keys that ends next
    strips: Any  # `Spans`, STRIP_BITS each | flags


class Work(NamedTuple):
    """The first `count` items are work, ordered by row, block of queries, block of keys."""

    items: Items
    count: Any  # int, or int32 scalar


class Spans(NamedTuple):
    """Strips that some query of the block sees: [first, end), and every query: [full, mixed)."""

    first: Any
    full: Any
    mixed: Any
    end: Any


def spans(word: Any) -> Spans:
    """Unpacks a word of `Items.strips`."""
    return Spans(*(word >> STRIP_BITS * i & (1 << STRIP_BITS) - 1 for i in range(4)))


class Ranges(NamedTuple):
    """Range of (segment, position) in each block, padding left out. Arrays [B blocks]."""

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
    """True where a ≤ b, lexicographically."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))


def meet(q: Ranges, k: Ranges, window: int) -> tuple[Any, Any]:
    """Tells if some query may see some key, and if every query sees every key: bool [B nq nk]."""
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
    """Lists the pairs of blocks that meet.

    Each block of queries and of keys is listed at least once, with no strips to compute if it meets
    nothing, so that the kernels write all of their outputs.

    Args:
      q_marks, k_marks: segments and positions of the queries and the keys, float32 [B 2 T or S].
        In NumPy they give a list that is known when the kernel is compiled.
      ordered: queries and keys are the same tokens, and none sees a later one.
    """
    xp = np if isinstance(q_marks, np.ndarray) else jnp
    some, every = meet(ranges(q_marks, blocks.q), ranges(k_marks, blocks.strip), window)
    (B, nq, _), num_strips = some.shape, blocks.k // blocks.strip
    some, every = (x.reshape(B, nq, -1, num_strips) for x in (some, every))
    active, nk = some.any(-1), some.shape[2]
    i, j = np.arange(nq)[None, :, None], np.arange(nk)[None, None]
    visit = active | (~active.any(2, keepdims=True) & (j == 0))
    visit = visit | (~visit.any(1, keepdims=True) & (i == nq - 1))

    first = xp.argmax(some, axis=-1)
    end = xp.where(active, num_strips - xp.argmax(some[..., ::-1], axis=-1), first)
    # Every query sees a contiguous span of strips of sorted rows; the first one of others is taken.
    full = xp.where(every.any(-1), xp.argmax(every, axis=-1), end)
    after = ~every & (np.arange(num_strips)[None, None, None] >= full[..., None])
    mixed = xp.where(after.any(-1), xp.argmax(after, axis=-1), num_strips)
    mixed = xp.where(full < end, mixed, end)
    strips = first | full << STRIP_BITS | mixed << 2 * STRIP_BITS | end << 3 * STRIP_BITS
    flags = (
        (FIRST_Q, visit & (xp.cumsum(visit, 2) == 1)),
        (LAST_Q, visit & (xp.cumsum(visit[:, :, ::-1], 2)[:, :, ::-1] == 1)),
        (FIRST_K, visit & (xp.cumsum(visit, 1) == 1)),
        (LAST_K, visit & (xp.cumsum(visit[:, ::-1], 1)[:, ::-1] == 1)),
    )
    for flag, where in flags:
        strips = strips | xp.where(where, flag, 0)

    possible = B * nq * nk
    if ordered:
        ends = (np.arange(nq) + 1) * blocks.q
        possible = B * int(np.minimum(-(-ends // blocks.k), nk).sum() + nk)
    size = {} if xp is np else {'size': min(possible, B * nq * nk), 'fill_value': 0}
    (items,) = xp.nonzero(visit.reshape(-1), **size)
    count = len(items) if xp is np else visit.sum(dtype=jnp.int32)
    queries, keys = items // nk, items % nk
    strips = strips.reshape(-1)[items]
    index = xp.arange(len(items))
    # A row of the batch begins all its blocks of keys in its own items, and finishes them there.
    begun = xp.where(strips & FIRST_K, index, 0)
    finished = xp.where((strips & LAST_K != 0) & (index < count), index, count - 1)
    if xp is np:
        begun = np.maximum.accumulate(begun)
        finished = np.minimum.accumulate(finished[::-1])[::-1]
    else:
        begun, finished = jax.lax.cummax(begun), jax.lax.cummin(finished, reverse=True)
    word = functools.partial(jnp.asarray, dtype=jnp.int32)
    words = Items(
        queries=word(queries // nq << 16 | queries % nq),
        keys=word(keys << 16 | keys[begun]),
        writes=word(keys[finished]),
        strips=word(strips),
    )
    return Work(words, count)
