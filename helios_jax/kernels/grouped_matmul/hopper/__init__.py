"""Grouped products on NVIDIA Hopper, in Pallas Mosaic GPU: two kernels of one design.

They are persistent: a block of three warpgroups stays on each multiprocessor and walks over tiles
of the result. One warpgroup copies operands into a ring in shared memory (TMA), DEPTH of the
contraction at a step, and runs ahead over the borders of tiles. The other two multiply (wgmma),
each its half of a tile's rows. A tile is stored while the next one is multiplied.

No tile belongs to two groups. A copy may begin at any row, so a group's tiles begin with its
first row, and the last one is moved back until it ends with the group: it computes some rows
twice, to the same bits, and nothing is masked. Only a group of fewer rows than a tile is stored
in pieces. The gradient of weights contracts over a group's rows; other groups' rows in its first
and last step are blanked in shared memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from helios_jax.kernels.grouped_matmul.hopper.block import launch
from helios_jax.kernels.grouped_matmul.hopper.rows import row_products
from helios_jax.kernels.grouped_matmul.hopper.tile import DEPTH, GRAIN, ROWS, columns_of
from helios_jax.kernels.grouped_matmul.hopper.weights import weight_products
from helios_jax.kernels.grouped_matmul.hopper.work import descending, running_sum, work_list

__all__ = ['multiply', 'weight_gradient']


def multiply(
    rows: Float[Array, 'M _'],
    weights: Float[Array, 'E D F'],
    group_sizes: Int[Array, 'E'],
    *,
    transposed: bool = False,
) -> Float[Array, 'M _']:
    """Multiplies rows [M D] of group e by weights[e], or rows [M F] by its transpose.

    Rows are sorted by group. Those beyond the sum of the sizes belong to no group: they are not
    read, and their results are zeros. Accumulates in float32. Weights are read where they lie.
    arch/grouped_matmul.py says what the kernels can take.
    """
    M, (_, D, F) = rows.shape[0], weights.shape
    contracted, width = (F, D) if transposed else (D, F)
    if M < ROWS:
        rows = jnp.pad(rows, ((0, ROWS - M), (0, 0)))  # a copy's box must fit into its array
    columns = columns_of(width)
    work, count = work_list(group_sizes, rows.shape[0])
    out = launch(
        functools.partial(row_products, transposed=transposed, num_steps=contracted // DEPTH),
        jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype),
        (ROWS, DEPTH),
        (columns, DEPTH) if transposed else (DEPTH, columns),
        columns,
    )(work, count, rows, weights)
    return out[:M]


def weight_gradient(
    rows: Float[Array, 'M D'], gradient: Float[Array, 'M F'], group_sizes: Int[Array, 'E']
) -> Float[Array, 'E D F']:
    """Contracts each group's rows with the gradient of its products; zeros for an empty group.

    Accumulates in float32, returns rows.dtype. Rows of no group do not matter.
    """
    (M, D), F, E = rows.shape, gradient.shape[1], group_sizes.shape[0]
    # The arrays are copied where their rows do not fill tiles of the swizzle.
    if extra := max(DEPTH, pl.cdiv(M, GRAIN) * GRAIN) - M:
        rows, gradient = (jnp.pad(x, ((0, extra), (0, 0))) for x in (rows, gradient))
    sizes = group_sizes.astype(jnp.int32)
    starts = running_sum(sizes) - sizes
    # Tasks are dealt out in turn: from the largest to the smallest, all blocks get about as much.
    order = descending(sizes)
    columns = columns_of(F)
    return launch(
        weight_products,
        jax.ShapeDtypeStruct((E, D, F), rows.dtype),
        (DEPTH, ROWS),
        (DEPTH, columns),
        columns,
    )(order, starts[order], sizes[order], rows, gradient)
