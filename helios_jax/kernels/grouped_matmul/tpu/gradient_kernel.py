"""Kernel of rowsᵀ · gradient: for each group the contraction over its own rows.

The grid goes through blocks of the result's matrix, which the cores share, and for each through all
items (work.py), whose products add up in float32 in VMEM. There is no pass that clears the sums or
rounds the result: a group's first product replaces the sums, and each writes the rounded result.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from helios_jax.kernels.cost import estimate
from helios_jax.kernels.grouped_matmul.tpu.tiles import GradientTiles
from helios_jax.kernels.grouped_matmul.tpu.work import GroupItems, GroupWork, walk

NAME = 'helios_grouped_weight_gradient'
Ref = Any


def weight_gradient(
    rows: Float[Array, 'M D'],
    gradient: Float[Array, 'M F'],
    work: GroupWork,
    *,
    num_groups: int,
    tiles: GradientTiles,
    vmem: int,
    interpret: Any,
) -> Float[Array, 'E D F']:
    """Runs the kernel on the items of `work.of_groups`; `vmem`: bytes that it may take."""
    D, F = rows.shape[1], gradient.shape[1]
    across = pl.cdiv(D, tiles.height)
    result = jax.ShapeDtypeStruct((num_groups, D, F), rows.dtype)

    # One leading dimension for both, so that two cores always find one to share.
    def place(block: Any) -> tuple[Any, Any]:
        return block % across, block // across

    return pl.pallas_call(
        functools.partial(kernel, tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(across * pl.cdiv(F, tiles.width), work.length),
            in_specs=[
                pl.BlockSpec(
                    (tiles.rows, tiles.height), lambda b, i, items: (items.tile[i], place(b)[0])
                ),
                pl.BlockSpec(
                    (tiles.rows, tiles.width), lambda b, i, items: (items.tile[i], place(b)[1])
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, tiles.height, tiles.width), lambda b, i, items: (items.group[i], *place(b))
            ),
            scratch_shapes=[pltpu.VMEM((tiles.height, tiles.width), jnp.float32)],
        ),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        cost_estimate=estimate(2 * rows.size * F, (rows, gradient, result)),
        interpret=interpret,
        name=NAME,
    )(work.items, rows, gradient)


def kernel(
    tiles: GradientTiles, items: GroupItems, rows: Ref, gradient: Ref, out: Ref, sums: Ref
) -> None:
    """Runs one item for one block of the result."""
    item = pl.program_id(1)
    begin, end = items.begin[item], items.end[item]
    fresh = (item == 0) | (items.group[jnp.maximum(item - 1, 0)] != items.group[item])

    def down(step: int, run: Any) -> None:
        """Calls `run` for each `step` rows of the block."""
        if step == tiles.height:
            run(slice(None))
        else:
            one = lambda n, _: run(pl.ds(pl.multiple_of(n * step, step), step))
            jax.lax.fori_loop(0, tiles.height // step, one, None)

    def add(x: Array, y: Array, part: Any, first: Any) -> None:
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        dims = (((0,), (0,)), ((), ()))
        new = jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)
        new += jnp.where(first, 0.0, sums[part])
        sums[part] = new
        out[part] = new.astype(out.dtype)

    @pl.when(begin == end)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    def piece(start: Any, size: int, first: Any) -> None:
        at, inside = pl.ds(start, size), (begin - start, end - start)

        def run(part: Any) -> None:
            x, y = blanked(rows[at, part], *inside), blanked(gradient[at], *inside)
            add(x, y, part, fresh & first)

        down(tiles.steps[tiles.sizes.index(size)], run)

    walk(begin, end, tiles.rows, tiles.sizes, piece)


def blanked(x: Array, begin: Any, end: Any) -> Array:
    """Zeroes the rows outside [begin, end), whatever they hold: 0·NaN would be NaN."""
    if x.dtype.itemsize == 4:
        row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where((row >= begin) & (row < end), x, 0)
    # Two rows share a register's 32 bits, and not every generation selects halves.
    pairs = pltpu.bitcast(x, jnp.uint32)
    row = 2 * jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 0)
    keep = lambda row, bits: jnp.where((row >= begin) & (row < end), bits, jnp.uint32(0))
    mask = keep(row, jnp.uint32(0xFFFF)) | keep(row + 1, jnp.uint32(0xFFFF0000))
    return pltpu.bitcast(pairs & mask, x.dtype)
