"""Lists of work for the kernels, made on the device by a few reductions over the group sizes."""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Int

from helios_jax.kernels.grouped_matmul.hopper.tile import ROWS


def work_list(
    group_sizes: Int[Array, 'E'], M: int
) -> tuple[Int[Array, 'tiles 3'], Int[Array, '1']]:
    """Lists row tiles as (group, first row, rows), one after another, and counts them.

    Rows of no group are those of a group E, whose tiles contract over nothing.
    """
    E = group_sizes.shape[0]
    ends = jnp.append(running_sum(group_sizes.astype(jnp.int32)), jnp.int32(M))
    starts = jnp.append(jnp.int32(0), ends[:-1])
    tiles = pl.cdiv(ends - starts, ROWS)
    ends_of_tiles = running_sum(tiles)
    tile = jnp.arange(M // ROWS + E + 1, dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= ends_of_tiles[None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, E)  # entries after the last tile are not used
    first = starts[group] + (tile - (ends_of_tiles - tiles)[group]) * ROWS
    first = jnp.maximum(jnp.minimum(first, ends[group] - ROWS), starts[group])
    work = jnp.stack([group, first, jnp.minimum(ends[group] - first, ROWS)], axis=1)
    return work, ends_of_tiles[-1:]


def running_sum(sizes: Int[Array, 'E']) -> Int[Array, 'E']:
    """Sums sizes[: e + 1] for each e in one reduction, where a scan takes several kernels."""
    e = jnp.arange(sizes.size)
    return jnp.sum(jnp.where(e[:, None] >= e[None], sizes[None], 0), axis=1, dtype=jnp.int32)


def descending(sizes: Int[Array, 'E']) -> Int[Array, 'E']:
    """Orders indices by size, the largest first; by reductions, for a sort takes longer."""
    e = jnp.arange(sizes.size, dtype=jnp.int32)
    own, other = sizes[:, None], sizes[None]
    ahead = (other > own) | ((other == own) & (e[None] < e[:, None]))
    rank = jnp.sum(ahead, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank[None] == e[:, None], e[None], 0), axis=1, dtype=jnp.int32)
