"""Lists the work of a grouped matmul: which rows of which tile belong to which group.

Rows are sorted by group and cut into tiles of one size. An item is a group's share of a tile; the
kernels run one a grid step, and read the list from scalar memory. It is made on the device from
the group sizes by prefix sums, and has at most one item a tile and one a group, less one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


class Items(NamedTuple):
    """Work items, in the order of the rows; those from `Work.count` on are not run."""

    group: Int[Array, 'W']
    tile: Int[Array, 'W']
    begin: Int[Array, 'W']  # first row of the group in the tile
    end: Int[Array, 'W']  # row after its last; `begin` where it has none


class Work(NamedTuple):
    items: Items
    count: Int[Array, '']


def of_tiles(group_sizes: Int[Array, 'E'], num_rows: int, tile: int) -> Work:
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


def of_groups(group_sizes: Int[Array, 'E'], num_rows: int, tile: int) -> Work:
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
) -> Work:
    """Lists `tiles` items for each group, from tile `first` on."""
    last = jnp.cumsum(tiles)
    index = jnp.minimum(jnp.arange(longest, dtype=jnp.int32), last[-1] - 1)[:, None]
    # Sums over one entry: a gather of scalars takes a TPU longer.
    own = (index >= last - tiles) & (index < last)
    pick = lambda x: jnp.sum(jnp.where(own, x, 0), axis=1, dtype=jnp.int32)
    at = pick(first - (last - tiles)) + index[:, 0]
    inside = lambda x: jnp.clip(pick(x) - at * tile, 0, tile)
    begin = inside(starts)
    items = Items(
        group=pick(jnp.arange(len(tiles), dtype=jnp.int32)),
        tile=at,
        begin=begin,
        end=jnp.maximum(inside(ends), begin),
    )
    return Work(items, last[-1])
