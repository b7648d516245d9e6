"""Kernel of rows · weights: each tile of rows times the matrices of the groups that it has rows of.

The grid goes through the cores, each core's blocks of columns, and for each all items (work.py). A
block of weights has the whole contraction and stays as long as its group does, so that weights are
read once, rows once for each block of columns, and sums never leave registers. While a group is
worked on, the next group's weights come in.
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
from helios_jax.kernels.grouped_matmul.tpu.tiles import MultiplyTiles
from helios_jax.kernels.grouped_matmul.tpu.work import GroupItems, GroupWork, Turns, walk

NAME = 'helios_grouped_multiply'
Ref = Any


def multiply(
    rows: Float[Array, 'M C'],
    weights: Float[Array, 'E D F'],
    work: GroupWork,
    turns: Turns,
    *,
    transposed: bool,
    tiles: MultiplyTiles,
    vmem: int,
    interpret: Any,
) -> Array:
    """Runs the kernel on the items of `work.of_tiles`, with the weights of `work.turns`.

    Args:
      transposed: multiply by the transposes of `weights`, which are read as they lie.
      vmem: bytes that the kernel may take.
    """
    M, depth = rows.shape
    N, columns = weights.shape[1 if transposed else 2], tiles.columns
    assert N % (columns * tiles.cores) == 0, 'tiles are chosen so'
    each = N // columns // tiles.cores
    held = (columns, depth) if transposed else (depth, columns)
    result = jax.ShapeDtypeStruct((M, N), rows.dtype)
    return pl.pallas_call(
        functools.partial(kernel, tiles, transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles.cores, each, work.length),
            in_specs=[
                pl.BlockSpec((tiles.rows, depth), lambda c, n, i, items, _: (items.tile[i], 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(
                (tiles.rows, columns), lambda c, n, i, items, _: (items.tile[i], c * each + n)
            ),
            scratch_shapes=[
                pltpu.VMEM((2, *held), weights.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        cost_estimate=estimate(2 * M * depth * N, (rows, weights, result)),
        interpret=interpret,
        name=f'{NAME}_transposed' if transposed else NAME,
    )(work.items, turns, rows, weights)


def kernel(
    tiles: MultiplyTiles,
    transposed: bool,
    items: GroupItems,
    turns: Turns,
    rows: Ref,
    weights: Ref,
    out: Ref,
    held: Ref,
    arrived: Ref,
) -> None:
    """Runs one item for one block of columns."""
    item = pl.program_id(2)
    begin, end = items.begin[item], items.end[item]
    before = jnp.maximum(item - 1, 0)
    slot = fetched(tiles, transposed, items, turns, weights, held, arrived)
    width = out.shape[1]

    def product(at: Any, columns: Any) -> Array:
        exact = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        block = held[slot, columns] if transposed else held[slot, :, columns]
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
    fresh = (item == 0) | (items.tile[before] != items.tile[item])

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


def fetched(
    tiles: MultiplyTiles,
    transposed: bool,
    items: GroupItems,
    turns: Turns,
    weights: Ref,
    held: Ref,
    arrived: Ref,
) -> Any:
    """Waits for the weights of this step's group, and sends for those to come after.

    Returns:
      Which of both buffers has them.
    """
    core, block, item = (pl.program_id(axis) for axis in range(3))
    each = pl.num_programs(1)
    group = items.group[item]
    # Groups take turns with the buffers, on through the blocks of columns.
    count = turns.total[0]
    turn = block * count + turns.place[group]
    slot = turn & 1

    def copy(group: Any, block: Any, slot: Any) -> Any:
        source = weights.at[group]
        if source.shape != held.shape[1:]:
            columns = tiles.columns
            at = pl.ds(pl.multiple_of((core * each + block) * columns, columns), columns)
            source = source.at[at] if transposed else source.at[:, at]
        return pltpu.make_async_copy(source, held.at[slot], arrived.at[slot])

    some = items.begin[item] < items.end[item]
    before = items.group[jnp.maximum(item - 1, 0)]

    @pl.when(some & ((item == 0) | (before != group)))
    def _() -> None:
        @pl.when(turn == 0)
        def _() -> None:
            copy(group, block, 0).start()

        copy(group, block, slot).wait()
        final = turns.place[group] == count - 1
        following = jnp.where(final, block + 1, block)

        @pl.when(following < each)
        def _() -> None:
            copy(turns.after[group], following, 1 - slot).start()

    return slot
