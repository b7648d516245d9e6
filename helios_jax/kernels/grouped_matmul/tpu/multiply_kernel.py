"""Kernel of rows · weights: each tile of rows times the matrices of the groups that it has rows of.

The grid goes through blocks of columns, which the cores share, and for each through all items
(work.py). A block of weights has the whole contraction and stays as long as the group does, so
that weights are read once, rows once for each block of columns, and sums never leave registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from helios_jax.kernels.grouped_matmul.tpu.tiles import MultiplyTiles
from helios_jax.kernels.grouped_matmul.tpu.work import Items, Work, walk

NAME = 'helios_grouped_multiply'
Ref = Any


def multiply(
    rows: Float[Array, 'M C'],
    weights: Float[Array, 'E D F'],
    work: Work,
    *,
    transposed: bool,
    tiles: MultiplyTiles,
    vmem: int,
    interpret: Any,
) -> Array:
    """Runs the kernel on the items of `work.of_tiles`.

    Args:
      transposed: multiply by the transposes of `weights`, which are read as they lie.
      vmem: bytes that the kernel may take.
    """
    M, depth = rows.shape
    N = weights.shape[1 if transposed else 2]
    if transposed:
        block = pl.BlockSpec((None, tiles.columns, depth), lambda n, i, items: (items.group[i], n, 0))
    else:
        block = pl.BlockSpec((None, depth, tiles.columns), lambda n, i, items: (items.group[i], 0, n))
    return pl.pallas_call(
        functools.partial(kernel, tiles, transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(N, tiles.columns), work.count),
            in_specs=[
                pl.BlockSpec((tiles.rows, depth), lambda n, i, items: (items.tile[i], 0)),
                block,
            ],
            out_specs=pl.BlockSpec(
                (tiles.rows, tiles.columns), lambda n, i, items: (items.tile[i], n)
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((M, N), rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        interpret=interpret,
        name=f'{NAME}_transposed' if transposed else NAME,
    )(work.items, rows, weights)


def kernel(
    tiles: MultiplyTiles, transposed: bool, items: Items, rows: Ref, weights: Ref, out: Ref
) -> None:
    """Runs one item for one block of columns."""
    item = pl.program_id(1)
    begin, end = items.begin[item], items.end[item]
    width = out.shape[1]

    def product(at: Any, columns: Any) -> Array:
        exact = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        block = weights[columns] if transposed else weights[:, columns]
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        return jax.lax.dot_general(
            rows[at], block, dims, precision=exact, preferred_element_type=jnp.float32
        )

    def across(step: int, run: Any) -> None:
        """Calls `run` for each `step` columns."""
        if step == width:
            run(slice(None))
        else:
            one = lambda n, _: run(pl.ds(pl.multiple_of(n * step, step), step))
            jax.lax.fori_loop(0, width // step, one, None)

    whole = (begin == 0) & (end == tiles.rows)
    # The first item of a tile blanks it: rows that no item writes belong to no group.
    fresh = (item == 0) | (items.tile[jnp.maximum(item - 1, 0)] != items.tile[item])

    @pl.when(fresh & ~whole)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    def piece(first: Any, size: int, _: Any) -> None:
        at = pl.ds(first, size)

        def run(columns: Any) -> None:
            # A row of another group keeps what it has. Its product, of whatever it holds times
            # the wrong matrix, is dropped.
            new = product(at, columns)
            row = jax.lax.broadcasted_iota(jnp.int32, new.shape, 0) + first
            old = out[at, columns].astype(jnp.float32)
            new = jnp.where((row >= begin) & (row < end), new, old)
            out[at, columns] = new.astype(out.dtype)

        across(tiles.steps[tiles.sizes.index(size)], run)

    walk(begin, end, tiles.rows, tiles.sizes, piece)
