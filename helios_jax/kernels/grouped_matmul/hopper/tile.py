"""A tile of the result: its size, and the order in which tasks take tiles."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

DEPTH = 64  # of a step; a row of it fills the 128 bytes over which a copy swizzles
CHUNK = 64  # columns that are stored at a time
HALF = 64  # rows of the tile that one warpgroup multiplies
ROWS = 2 * HALF
GRAIN = 8  # rows of a tile of the swizzle
BAND = 16  # row tiles that tasks walk down before the next column tile


def columns_of(width: int) -> int:
    """Columns of a tile, which divide the result's width."""
    return 256 if width % 256 == 0 else 128


def place(task: Array, tall: Any, wide: int) -> tuple[Array, Array]:
    """Finds the row tile and the column tile of a task among tall × wide.

    Tasks go down BAND row tiles, then to the next column tile, there and back again, so that
    those which run at a time share operands in the L2 cache.
    """
    band = lax.div(task, jnp.int32(BAND * wide))
    within = lax.rem(task, jnp.int32(BAND * wide))
    height = jnp.minimum(BAND, tall - band * BAND)
    column = lax.div(within, height)
    column = jnp.where(lax.rem(band, jnp.int32(2)) == 0, column, wide - 1 - column)
    return band * BAND + lax.rem(within, height), column
