"""Lists the work of a grouped matmul: which rows of which tile belong to which group.

Rows are sorted by group and cut into tiles of one size. An item is a group's share of a tile; the
kernels run one a grid step, and read the list from scalar memory. It is made on the device from
the group sizes by prefix sums, and has at most one item a tile and one a group, less one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Int

ALIGNED = 16  # rows that share registers: a slice of a tile begins at a multiple


class GroupItems(NamedTuple):
    """GroupWork items, in the order of the rows; those from `GroupWork.length` on are not run."""

    group: Int[Array, 'W']
    tile: Int[Array, 'W']
    begin: Int[Array, 'W']  # first row of the group in the tile
    end: Int[Array, 'W']  # row after its last; `begin` where it has none


class GroupWork(NamedTuple):
    items: GroupItems
    length: Int[Array, '']  # number of items


class Turns(NamedTuple):
    """Order in which the groups with rows take turns, for use of their matrices."""

    place: Int[Array, 'E']  # number of such groups before
    after: Int[Array, 'E']  # next such group; the first one after the last
    total: Int[Array, '1']  # number of them


def turns(group_sizes: Int[Array, 'E'], num_rows: int) -> Turns:
    """Lists the turns of the groups that `of_tiles` has rows of."""
    starts, ends = spans(group_sizes, num_rows)
    some = ends > starts
    so_far = jnp.cumsum(some, dtype=jnp.int32)
    groups = jnp.arange(len(group_sizes), dtype=jnp.int32)
    beyond = jnp.int32(len(group_sizes))
    later = some[None] & (groups[None] > groups[:, None])
    after = jnp.min(jnp.where(later, groups[None], beyond), axis=1)
    first = jnp.min(jnp.where(some, groups, beyond))
    # Without any rows there is no first one.
    after = jnp.minimum(jnp.where(after < beyond, after, first), beyond - 1)
    return Turns(so_far - some, after, so_far[-1:])


def of_tiles(group_sizes: Int[Array, 'E'], num_rows: int, tile: int) -> GroupWork:
    """Lists the items of a product by rows: every tile has one at least.

    A tile of rows of no group alone has one item without rows.
    """
    starts, ends = spans(group_sizes, num_rows)
    nothing = jnp.maximum(-(-ends[-1:] // tile), 0)  # first tile without any group's rows
    first = jnp.append(starts // tile, nothing)
    total = -(-num_rows // tile)
    tiles = jnp.append(covered(starts, ends, tile), total - nothing)
    starts, ends = (jnp.append(x, nothing * tile) for x in (starts, ends))
    work = listed(starts, ends, first, tiles, tile, total + len(group_sizes) - 1)
    # Rows of no group are multiplied by nothing, but the block that is fetched must exist.
    group = jnp.minimum(work.items.group, len(group_sizes) - 1)
    return work._replace(items=work.items._replace(group=group))


def of_groups(group_sizes: Int[Array, 'E'], num_rows: int, tile: int) -> GroupWork:
    """Lists the items of a contraction over each group's rows: every group has one at least."""
    starts, ends = spans(group_sizes, num_rows)
    total = -(-num_rows // tile)
    # An empty group at the very end begins where no tile is.
    first = jnp.minimum(starts // tile, total - 1)
    tiles = jnp.maximum(covered(starts, ends, tile), 1)
    return listed(starts, ends, first, tiles, tile, total + len(group_sizes) - 1)


def spans(group_sizes: Int[Array, 'E'], num_rows: int) -> tuple[Array, Array]:
    """Returns the first row of each group, and the row after its last."""
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def covered(starts: Array, ends: Array, tile: int) -> Array:
    """Counts the tiles that each group has rows in."""
    return jnp.where(ends > starts, -(-ends // tile) - starts // tile, 0)


def listed(
    starts: Array, ends: Array, first: Array, tiles: Array, tile: int, longest: int
) -> GroupWork:
    """Lists `tiles` items for each group, from tile `first` on."""
    last = jnp.cumsum(tiles)
    index = jnp.minimum(jnp.arange(longest, dtype=jnp.int32), last[-1] - 1)[:, None]
    # Sums over one entry: a gather of scalars takes a TPU longer.
    own = (index >= (last - tiles)[None]) & (index < last[None])
    pick = lambda x: jnp.sum(jnp.where(own, x[None], 0), axis=1, dtype=jnp.int32)
    at = pick(first - (last - tiles)) + index[:, 0]
    inside = lambda x: jnp.clip(pick(x) - at * tile, 0, tile)
    begin = inside(starts)
    items = GroupItems(
        group=pick(jnp.arange(len(tiles), dtype=jnp.int32)),
        tile=at,
        begin=begin,
        end=jnp.maximum(inside(ends), begin),
    )
    return GroupWork(items, last[-1])


def count_units(begin: Any, end: Any, unit: int) -> Any:
    """Counts the pieces of `unit` rows that an item takes; none for an item without rows."""
    return jnp.where(begin < end, divided(end - (begin & -ALIGNED) + (unit - 1), unit), 0)


def divided(x: Any, size: int) -> Any:
    """Divides what is not negative: to get signs right, `//` takes ten scalar operations more."""
    return x >> (size.bit_length() - 1) if size.bit_count() == 1 else x // size


def walk(
    begin: Any, end: Any, rows: int, sizes: tuple[int, ...], run: Callable[[Any, int, Any], None]
) -> None:
    """Covers the rows [begin, end) of a tile by pieces, the largest first. For use in a kernel.

    Pieces begin at the first row, near enough, and not at multiples of their size, so that rows of
    others are in the last one or where the tile ends: fewer than `sizes[-1]` and `ALIGNED`.

    Args:
      rows: of a tile, a multiple of the largest size.
      sizes: rows of a piece, each half of the one before.
      run: called with the first row of a piece, its size, and whether it is the item's first.
    """
    unit = sizes[-1]
    count = count_units(begin, end, unit)
    first = jnp.minimum(begin & -ALIGNED, rows - count * unit)

    def piece(before: Any, size: int) -> None:
        run(pl.multiple_of(first + before * unit, ALIGNED), size, before == 0)

    most = sizes[0] // unit
    loop = lambda index, _: piece(index * most, sizes[0])
    jax.lax.fori_loop(0, divided(count, most), loop, None)
    for size in sizes[1:]:
        units = size // unit
        pl.when(count & units != 0)(functools.partial(piece, count & -2 * units, size))


def runs(begin: np.ndarray, end: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Counts the pieces of each size that `walk` takes for items."""
    count = np.asarray(count_units(begin, end, sizes[-1]))
    first, *others = (size // sizes[-1] for size in sizes)
    return [count // first, *(count // units % 2 for units in others)]
