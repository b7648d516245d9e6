"""Rows times weights, or times transposed weights: tiles of a work list."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from helios_jax.kernels.grouped_matmul.hopper.block import Buffers, Kernel, Numbers, Ring
from helios_jax.kernels.grouped_matmul.hopper.tile import (
    CHUNK,
    DEPTH,
    HALF,
    ROWS,
    columns_of,
    place,
)


def row_products(
    work: Any,
    count: Any,
    rows: Any,
    weights: Any,
    out: Any,
    memory: Buffers,
    *,
    transposed: bool,
    num_steps: int,
) -> None:
    """Multiplies the row tiles of the work list with tiles of their group's weights."""
    E = weights.shape[0]
    columns = columns_of(out.shape[1])
    tall, wide = count[0], out.shape[1] // columns
    warpgroup = lax.axis_index('warpgroup')
    half = warpgroup * HALF
    rows_tiled, rows_untiled = memory.rows
    columns_tiled, _ = memory.columns
    ring = Ring(rows_untiled, columns_tiled, memory)

    def describe(task: Array) -> Numbers:
        tile, column = place(task, tall, wide)
        return work[tile, 0], work[tile, 1], work[tile, 2], column * columns

    def steps(group: Array) -> Array:
        return jnp.where(group < E, jnp.int32(num_steps), 0)

    def load(numbers: Numbers, step: Array) -> Array:
        group, first, _, column = numbers

        def fill(k: Array, step: Array) -> Array:
            along, across = pl.ds(k * DEPTH, DEPTH), pl.ds(column, columns)
            tile = weights.at[(group, across, along) if transposed else (group, along, across)]
            ring.fill(step, rows.at[pl.ds(first, ROWS), along], tile)
            return step + 1

        return lax.fori_loop(0, steps(group), fill, step)

    def compute(numbers: Numbers, step: Array, meanwhile: Any) -> tuple[Array, Array, Array]:
        group, first, size, column = numbers

        def multiply(acc: Any, slot: Array, k: Array) -> None:
            del k
            tile = columns_tiled.at[slot]
            tile = tile.transpose((1, 0)) if transposed else tile
            plgpu.wgmma(acc, rows_tiled.at[slot, pl.ds(half, HALF)], tile)

        value, step = ring.contract(
            step, steps(group), num_steps, (HALF, columns), multiply, meanwhile
        )
        own = jnp.clip(size - half, 0, HALF)

        @pl.when((own > 0) & (own < HALF))
        def _() -> None:
            store_rows(value, own, out, first + half, column, memory.out[2].at[warpgroup, 0])

        return value, own == HALF, step

    def target(numbers: Numbers) -> tuple[Any, Array]:
        _, first, _, column = numbers
        return out.at[pl.ds(first + half, HALF)], column

    Kernel(tall * wide, describe, load, compute, target, (HALF, columns)).run(ring)


def store_rows(
    value: Array, num_rows: Array, out: Any, first: Array, column: Array, plain: Any
) -> None:
    """Stores the first rows of half a tile to out[first:, column:], eight or one at a time."""
    for at in range(0, value.shape[1], CHUNK):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if hasattr(plgpu, 'store'):  # since jax 0.12, a store with bank conflicts has to say so
            plgpu.store(plain, value[:, at : at + CHUNK], optimized=False)
        else:
            plain[...] = value[:, at : at + CHUNK]
        plgpu.commit_smem()

        def piece(row: Array, size: int, at: int = at) -> None:
            to = out.at[pl.ds(first + row, size), pl.ds(column + at, CHUNK)]
            plgpu.copy_smem_to_gmem(plain.at[pl.ds(row, size)], to)

        eights = lax.div(num_rows, jnp.int32(8))
        lax.fori_loop(0, eights, lambda i, _: piece(i * 8, 8), None)
        lax.fori_loop(eights * 8, num_rows, lambda i, _: piece(i, 1), None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the memory is that of the next tile's stores
