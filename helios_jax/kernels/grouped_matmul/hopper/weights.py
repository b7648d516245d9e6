"""Gradient of weights: a contraction over the rows of each group."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from helios_jax.kernels.grouped_matmul.hopper.block import Buffers, Kernel, Numbers, Ring
from helios_jax.kernels.grouped_matmul.hopper.tile import (
    CHUNK,
    DEPTH,
    GRAIN,
    HALF,
    ROWS,
    columns_of,
    place,
)


def weight_products(
    order: Any, starts: Any, sizes: Any, rows: Any, gradient: Any, out: Any, memory: Buffers
) -> None:
    """Contracts rows [rows D] and gradient [rows F] of each group into tiles of out [E D F].

    Starts and sizes are those of the groups in `order`.
    """
    E, D, F = out.shape
    columns = columns_of(F)
    tall, wide = D // ROWS, F // columns
    warpgroup = lax.axis_index('warpgroup')
    half = warpgroup * HALF
    rows_tiled, rows_plain = memory.rows
    columns_tiled, columns_plain = memory.columns
    ring = Ring(rows_tiled, columns_tiled, memory)
    least = columns // CHUNK

    def describe(task: Array) -> Numbers:
        turn = lax.div(task, jnp.int32(tall * wide))
        # A copy begins at a multiple of GRAIN rows; those before the group's first are blanked.
        before = lax.rem(starts[turn], jnp.int32(GRAIN))
        tile = lax.rem(task, jnp.int32(tall * wide))
        return order[turn], starts[turn] - before, before, before + sizes[turn], tile

    def steps(before: Array, end: Array) -> Array:
        # So many that every store has a step to hide behind; the rows of some may all be blank.
        num_steps = jnp.maximum(lax.div(end + DEPTH - 1, jnp.int32(DEPTH)), least)
        return jnp.where(end > before, num_steps, 0)

    def load(numbers: Numbers, step: Array) -> Array:
        _, begin, before, end, tile = numbers
        row, column = place(tile, tall, wide)

        def fill(k: Array, step: Array) -> Array:
            along = pl.ds(begin + k * DEPTH, DEPTH)
            across = pl.ds(column * columns, columns)
            ring.fill(step, rows.at[along, pl.ds(row * ROWS, ROWS)], gradient.at[along, across])
            return step + 1

        return lax.fori_loop(0, steps(before, end), fill, step)

    def compute(numbers: Numbers, step: Array, meanwhile: Any) -> tuple[Array, Array, Array]:
        _, _, before, end, _ = numbers

        def multiply(acc: Any, slot: Array, k: Array) -> None:
            first = jnp.maximum(before - k * DEPTH, 0)
            last = jnp.minimum(end - k * DEPTH, DEPTH)

            @pl.when((first > 0) | (last < DEPTH))
            def _() -> None:
                # Both warpgroups write the same zeros, and so need not wait for each other.
                blank(rows_plain.at[slot], first, last)
                blank(columns_plain.at[slot], first, last)
                plgpu.commit_smem()

            own = rows_tiled.at[slot, :, pl.ds(half, HALF)]
            plgpu.wgmma(acc, own.transpose((1, 0)), columns_tiled.at[slot])

        value, step = ring.contract(
            step, steps(before, end), least, (HALF, columns), multiply, meanwhile
        )
        return value, jnp.bool_(True), step

    def target(numbers: Numbers) -> tuple[Any, Array]:
        row, column = place(numbers[-1], tall, wide)
        return out.at[numbers[0], pl.ds(row * ROWS + half, HALF)], column * columns

    num_tasks = jnp.int32(E * tall * wide)
    Kernel(num_tasks, describe, load, compute, target, (HALF, columns)).run(ring)


def blank(tiles: Any, first: Array, last: Array) -> None:
    """Zeroes rows before `first` and from `last` on: a product with zero would keep their NaN."""
    _, across, _, _ = tiles.shape

    def row(i: Array, _: None) -> None:
        at = (lax.div(i, jnp.int32(GRAIN)), slice(None), lax.rem(i, jnp.int32(GRAIN)))
        tiles[at] = jnp.zeros((across, DEPTH), jnp.bfloat16)

    def tile(i: Array, _: None) -> None:
        tiles[i] = jnp.zeros((across, GRAIN, DEPTH), jnp.bfloat16)

    whole = jnp.clip(lax.div(last + GRAIN - 1, jnp.int32(GRAIN)), 0, DEPTH // GRAIN)
    lax.fori_loop(0, first, row, None)
    lax.fori_loop(jnp.maximum(last, 0), whole * GRAIN, row, None)
    lax.fori_loop(whole, DEPTH // GRAIN, tile, None)
