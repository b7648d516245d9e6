"""Grouped products on NVIDIA Hopper: one kernel for rows, one for the gradient of weights.

Both are persistent: a block of three warpgroups stays on each multiprocessor and walks over
output tiles. One warpgroup copies operands into a ring of shared memory (TMA), a step of DEPTH
along the contraction at a time, and runs ahead over the borders of tiles. The other two multiply
(wgmma), each its half of the tile's rows, and store the result.

No tile belongs to two groups. A TMA copy may begin at any row, so a group's tiles begin at the
group's first row, and the last is moved back until it ends with the group: it computes some
rows twice, to the same bits, and needs no mask. Only a group of fewer rows than a tile is stored
in pieces. The gradient of weights contracts over a group's rows from the first one on; in its last
step, the rows of the next group are blanked in shared memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

DEPTH = 64  # of a step along the contraction: a row of it is the 128 bytes of a swizzle
CHUNK = 64  # columns that are stored at a time
HALF = 64  # rows of the tile that one warpgroup multiplies
ROWS = 2 * HALF
LOADER = 2  # index of the warpgroup that copies
MULTIPROCESSORS = 132  # of an H100 or H200, where a program is compiled without one
REGISTERS = {'loader': 40, 'multiplier': 232}  # a thread; all three fit into 64 Ki
SWIZZLED = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))


class Tiling(NamedTuple):
    """How the output is cut, and in which order."""

    columns: int  # of a tile
    stages: int  # steps in the ring
    pair: int  # 2: two blocks of a cluster take neighbouring row tiles and share the columns' operand
    width: int  # row tiles that are walked over before the next column tile


def multiply(
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'E D F'],
    group_sizes: Int[Array, 'E'],
    *,
    transposed: bool = False,
    tiling: Tiling | None = None,
) -> Float[Array, 'M F']:
    """Multiplies the rows of group e by weights[e], or by its transpose: then rows are [M F].

    Rows are sorted by group. Those beyond the sum of the sizes belong to no group, and give zeros.
    Accumulates in float32.

    Args:
      transposed: contract over F; the result is [M D]. The weights are read where they lie.
    Raises:
      NotImplementedError: dtype, sizes or GPU that the kernel cannot take.
    """
    E, D, F = weights.shape
    contracted, columns = (F, D) if transposed else (D, F)
    check(rows, weights)
    M = rows.shape[0]
    tiling = tiling or Tiling(columns=256 if columns % 256 == 0 else 128, stages=4, pair=1, width=16)
    unit = ROWS * tiling.pair
    if M < unit:
        rows = jnp.pad(rows, ((0, unit - M), (0, 0)))  # a copy's box must fit into its array
    work, count = work_list(group_sizes, rows.shape[0], unit)
    depth = contracted // DEPTH
    out = launch(
        functools.partial(row_products, depth=depth, transposed=transposed, tiling=tiling),
        jax.ShapeDtypeStruct((rows.shape[0], columns), rows.dtype),
        (tiling.columns, DEPTH) if transposed else (DEPTH, tiling.columns),
        (ROWS, DEPTH),
        tiling,
        work,
        count,
        rows,
        weights,
    )
    return out[:M]


def weight_gradient(
    rows: Float[Array, 'M D'],
    gradient: Float[Array, 'M F'],
    group_sizes: Int[Array, 'E'],
    *,
    tiling: Tiling | None = None,
) -> Float[Array, 'E D F']:
    """Contracts each group's rows with the gradient of its products; zeros for an empty group.

    Accumulates in float32, returns rows.dtype. Rows of no group are not read.

    Raises:
      NotImplementedError: dtype, sizes or GPU that the kernel cannot take.
    """
    check(rows, gradient)
    (M, D), F, E = rows.shape, gradient.shape[1], group_sizes.shape[0]
    tiling = tiling or Tiling(columns=256 if F % 256 == 0 else 128, stages=4, pair=1, width=16)
    if M < DEPTH:
        rows, gradient = (jnp.pad(x, ((0, DEPTH - M), (0, 0))) for x in (rows, gradient))
    sizes = group_sizes.astype(jnp.int32)
    return launch(
        functools.partial(weight_products, tiling=tiling),
        jax.ShapeDtypeStruct((E, D, F), rows.dtype),
        (DEPTH, tiling.columns),
        (DEPTH, ROWS),
        tiling,
        jnp.cumsum(sizes) - sizes,
        sizes,
        rows,
        gradient,
    )


def check(rows: Array, other: Array) -> None:
    """Refuses what the kernels cannot take."""
    for x in (rows, other):
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f'multiplies bfloat16, not {x.dtype}.')
        if bad := [size for size in x.shape[-2:][x.ndim == 2 :] if size % ROWS]:
            raise NotImplementedError(f'needs widths that {ROWS} divides, not {bad[0]}.')
    device = jax.devices()[0]
    capability = getattr(device, 'compute_capability', '9.0') if device.platform == 'gpu' else '9.0'
    if capability != '9.0':
        raise NotImplementedError(f'needs a Hopper GPU (9.0), not compute capability {capability}.')


def work_list(
    group_sizes: Int[Array, 'E'], M: int, unit: int
) -> tuple[Int[Array, 'entries'], Int[Array, '1']]:
    """Lists the row tiles as (group, first row, rows) one after another, and counts them.

    Rows of no group are those of a group E; its tiles contract over nothing.
    """
    E = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, M - jnp.sum(sizes))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    tiles = -(-sizes // unit)
    last = jnp.cumsum(tiles)
    tile = jnp.arange(M // unit + E + 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(tile[:, None] >= last[None], axis=1, dtype=jnp.int32), E)
    first = starts[group] + (tile - (last - tiles)[group]) * unit
    first = jnp.maximum(jnp.minimum(first, ends[group] - unit), starts[group])
    work = jnp.stack([group, first, jnp.minimum(ends[group] - first, unit)], axis=1)
    return work.reshape(-1), last[-1:]


def launch(
    body: Any,
    out: jax.ShapeDtypeStruct,
    columns_box: tuple[int, int],
    rows_box: tuple[int, int],
    tiling: Tiling,
    *operands: Array,
) -> Array:
    """Runs a body on every multiprocessor, with a ring of operands and buffers for the result."""
    device = jax.devices()[0]
    num_blocks = device.core_count if device.platform == 'gpu' else MULTIPROCESSORS
    stages, pair = tiling.stages, tiling.pair
    empty: Any = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    if pair > 1:
        empty = plgpu.ClusterBarrier(collective_axes=('pair',), num_arrivals=2, num_barriers=stages)
    scratch = {
        'rows_smem': plgpu.SMEM((stages, *rows_box), jnp.bfloat16, transforms=SWIZZLED),
        'columns_smem': plgpu.SMEM((stages, *columns_box), jnp.bfloat16, transforms=SWIZZLED),
        # The pieces of a small group lie in rows as they are, in the same memory.
        'out_smem': plgpu.RefUnion(
            plgpu.SMEM((2, 2, HALF, CHUNK), jnp.bfloat16, transforms=SWIZZLED),
            plgpu.SMEM((2, 2, HALF, CHUNK), jnp.bfloat16),
        ),
        'full': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        'empty': empty,
        'both': plgpu.Barrier(num_arrivals=2),
    }
    kernel = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(num_blocks // pair,),
        grid_names=('block',),
        cluster=(pair,) if pair > 1 else (),
        cluster_names=('pair',) if pair > 1 else (),
        num_threads=3,
        thread_name='warpgroup',
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(*operands)


class Ring(NamedTuple):
    """Slots of shared memory that the loader fills and both multipliers empty."""

    rows: Any
    columns: Any
    full: Any
    empty: Any
    tiling: Tiling

    def slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.tiling.stages))

    def fill(self, step: Array, rows: Any, columns: Any) -> None:
        """Copies a step's operands as soon as its slot is empty."""
        slot = self.slot(step)

        @pl.when(step >= self.tiling.stages)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[slot])

        shared = 'pair' if self.tiling.pair > 1 else None
        full = self.full.at[slot]
        plgpu.copy_gmem_to_smem(rows, self.rows.at[slot], full)
        plgpu.copy_gmem_to_smem(columns, self.columns.at[slot], full, collective_axes=shared)

    def drain(self, step: Array) -> None:
        """Waits until all of the filled slots are empty, so that no barrier is left in use."""
        for back in range(1, self.tiling.stages + 1):

            @pl.when(step >= back)
            def _(back: int = back) -> None:
                plgpu.barrier_wait(self.empty.at[self.slot(step - back)])

    def contract(self, step: Array, num_steps: Array, multiply: Any) -> tuple[Array, Array]:
        """Sums multiply(acc, slot, k) over a tile's steps; returns the sum and the next step."""

        def scope(acc: Any) -> tuple[Array, Array]:
            def body(k: Array, step: Array) -> Array:
                slot = self.slot(step)
                plgpu.barrier_wait(self.full.at[slot])
                multiply(acc, slot, k)
                plgpu.wgmma_wait(1)  # the step before is done with its slot

                @pl.when(k > 0)
                def _() -> None:
                    plgpu.barrier_arrive(self.empty.at[self.slot(step - 1)])

                return step + 1

            end = lax.fori_loop(0, num_steps, body, step)
            value = acc[...]

            @pl.when(num_steps > 0)
            def _() -> None:
                plgpu.barrier_arrive(self.empty.at[self.slot(end - 1)])

            return value, end

        return pl.run_scoped(scope, plgpu.ACC((HALF, self.tiling.columns), jnp.float32))


def place(task: Array, num_rows: Array, num_columns: int, width: int) -> tuple[Array, Array]:
    """Finds the row tile and the column tile of a task.

    Tasks go down `width` row tiles, then to the next column tile, there and back again, so that
    those which run at a time share their operands in the L2 cache.
    """
    band = lax.div(task, jnp.int32(width * num_columns))
    within = lax.rem(task, jnp.int32(width * num_columns))
    height = jnp.minimum(jnp.int32(width), num_rows - band * width)
    column = lax.div(within, height)
    column = jnp.where(lax.rem(band, jnp.int32(2)) == 0, column, num_columns - 1 - column)
    return band * width + lax.rem(within, height), column


def walk(num_tasks: Array, describe: Any, load: Any, compute: Any, ring: Ring) -> None:
    """Gives each block every so many-th task: the loader loads, the multipliers compute.

    What describes a task is read from memory while the task before it is at work.
    """
    warpgroup = lax.axis_index('warpgroup')
    block, num_blocks = lax.axis_index('block'), lax.axis_size('block')
    num_own = lax.div(num_tasks - block + num_blocks - 1, num_blocks)

    def loop(act: Any) -> Array:
        def body(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            task, step = carry
            ahead = describe(jnp.minimum(block + (i + 1) * num_blocks, num_tasks - 1))
            return ahead, act(task, step)

        start = (describe(jnp.minimum(block, num_tasks - 1)), jnp.int32(0))
        return lax.fori_loop(0, num_own, body, start)[1]

    @pl.when(warpgroup == LOADER)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS['loader'], action='decrease')
        ring.drain(loop(load))

    @pl.when(warpgroup != LOADER)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS['multiplier'], action='increase')
        loop(compute)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def store(value: Array, out: Any, columns: Array, smem: Any) -> None:
    """Stores one warpgroup's half of a tile into all rows of `out`, from column `columns` on."""
    for chunk in range(value.shape[1] // CHUNK):
        slot = chunk % 2
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        smem[slot] = value[:, chunk * CHUNK : (chunk + 1) * CHUNK].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[slot], out.at[:, pl.ds(columns + chunk * CHUNK, CHUNK)])


def store_plain(smem: Any, value: Array) -> None:
    """Stores into rows that lie as they are; slow, for its banks conflict."""
    if hasattr(plgpu, 'store'):  # since jax 0.12, what is slow has to be asked for
        plgpu.store(smem, value, optimized=False)
    else:
        smem[...] = value


def store_rows(
    value: Array, out: Any, first: Array, num_rows: Array, columns: Array, smem: Any
) -> None:
    """Stores the first rows of one warpgroup's half of a tile, eight or one at a time."""
    for chunk in range(value.shape[1] // CHUNK):
        at = pl.ds(columns + chunk * CHUNK, CHUNK)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store_plain(smem, value[:, chunk * CHUNK : (chunk + 1) * CHUNK].astype(jnp.bfloat16))
        plgpu.commit_smem()

        def piece(row: Array, size: int, at: Any = at) -> None:
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(row, size)], out.at[pl.ds(first + row, size), at])

        eights = lax.div(num_rows, jnp.int32(8))
        lax.fori_loop(0, eights, lambda i, _: piece(i * 8, 8), None)
        lax.fori_loop(eights * 8, num_rows, lambda i, _: piece(i, 1), None)


def row_products(
    work: Any,
    count: Any,
    rows: Any,
    weights: Any,
    out: Any,
    *,
    depth: int,
    transposed: bool,
    tiling: Tiling,
    rows_smem: Any,
    columns_smem: Any,
    out_smem: Any,
    full: Any,
    empty: Any,
    both: Any,
) -> None:
    """Multiplies row tiles of the work list with tiles of their group's weights."""
    del both
    E = weights.shape[0]
    ring = Ring(rows_smem, columns_smem, full, empty, tiling)
    swizzled, plain = out_smem
    num_columns = pl.cdiv(out.shape[1], tiling.columns)
    num_rows = count[0]
    half = lax.axis_index('warpgroup') * HALF
    if tiling.pair > 1:
        of_pair = lax.axis_index('pair') * ROWS

    def describe(task: Array) -> tuple[Array, ...]:
        tile, column = place(task, num_rows, num_columns, tiling.width)
        return work[3 * tile], work[3 * tile + 1], work[3 * tile + 2], column * tiling.columns

    def num_steps(group: Array) -> Array:
        return jnp.where(group < E, jnp.int32(depth), 0)

    def load(task: tuple[Array, ...], step: Array) -> Array:
        group, first, _, column = task
        first = first + of_pair if tiling.pair > 1 else first
        across = pl.ds(column, tiling.columns)

        def fill(k: Array, step: Array) -> Array:
            along = pl.ds(k * DEPTH, DEPTH)
            tile = weights.at[(group, across, along) if transposed else (group, along, across)]
            ring.fill(step, rows.at[pl.ds(first, ROWS), along], tile)
            return step + 1

        return lax.fori_loop(0, num_steps(group), fill, step)

    def compute(task: tuple[Array, ...], step: Array) -> Array:
        group, first, size, column = task

        def multiply(acc: Any, slot: Array, k: Array) -> None:
            tile = columns_smem.at[slot]
            tile = plgpu.transpose_ref(tile, (1, 0)) if transposed else tile
            plgpu.wgmma(acc, rows_smem.at[slot, pl.ds(half, HALF)], tile)

        value, step = ring.contract(step, num_steps(group), multiply)
        skipped = half + of_pair if tiling.pair > 1 else half
        own = jnp.clip(size - skipped, 0, HALF)
        at = first + skipped

        @pl.when(own == HALF)
        def _() -> None:
            store(value, out.at[pl.ds(at, HALF)], column, swizzled.at[lax.axis_index('warpgroup')])

        @pl.when((own > 0) & (own < HALF))
        def _() -> None:
            store_rows(value, out, at, own, column, plain.at[lax.axis_index('warpgroup'), 0])

        return step

    walk(num_rows * num_columns, describe, load, compute, ring)


def weight_products(
    starts: Any,
    sizes: Any,
    rows: Any,
    gradient: Any,
    out: Any,
    *,
    tiling: Tiling,
    rows_smem: Any,
    columns_smem: Any,
    out_smem: Any,
    full: Any,
    empty: Any,
    both: Any,
) -> None:
    """Contracts rows [rows D] and gradient [rows F] of each group into tiles of out [E D F]."""
    E, D, F = out.shape
    ring = Ring(rows_smem, columns_smem, full, empty, tiling)
    swizzled, _ = out_smem
    tall, wide = pl.cdiv(D, ROWS * tiling.pair), pl.cdiv(F, tiling.columns)
    warpgroup = lax.axis_index('warpgroup')
    half = warpgroup * HALF
    of_pair = lax.axis_index('pair') * ROWS if tiling.pair > 1 else 0

    def describe(task: Array) -> tuple[Array, ...]:
        group = lax.div(task, jnp.int32(tall * wide))
        tile, column = place(lax.rem(task, jnp.int32(tall * wide)), tall, wide, tiling.width)
        at = tile * (ROWS * tiling.pair) + of_pair
        return group, starts[group], sizes[group], at, column * tiling.columns

    def num_steps(size: Array) -> Array:
        return lax.div(size + DEPTH - 1, jnp.int32(DEPTH))

    def load(task: tuple[Array, ...], step: Array) -> Array:
        _, start, size, at, column = task

        def fill(k: Array, step: Array) -> Array:
            along = pl.ds(start + k * DEPTH, DEPTH)
            ring.fill(
                step,
                rows.at[along, pl.ds(at, ROWS)],
                gradient.at[along, pl.ds(column, tiling.columns)],
            )
            return step + 1

        return lax.fori_loop(0, num_steps(size), fill, step)

    def compute(task: tuple[Array, ...], step: Array) -> Array:
        group, _, size, at, column = task

        def blank(tile: Any, num_rows: Array) -> None:
            """Zeroes the rows from num_rows on: not by multiplication, 0 · NaN is NaN."""
            value = plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
            tile[...] = jnp.where(row < num_rows, value, jnp.bfloat16(0))

        def multiply(acc: Any, slot: Array, k: Array) -> None:
            own = rows_smem.at[slot, :, pl.ds(half, HALF)]

            @pl.when((k + 1) * DEPTH > size)
            def _() -> None:
                left = size - k * DEPTH
                blank(own, left)
                share = tiling.columns // 2
                for at in range(0, share, CHUNK):
                    blank(columns_smem.at[slot, :, pl.ds(warpgroup * share + at, CHUNK)], left)
                plgpu.commit_smem()
                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)

            plgpu.wgmma(acc, plgpu.transpose_ref(own, (1, 0)), columns_smem.at[slot])

        value, step = ring.contract(step, num_steps(size), multiply)
        store(value, out.at[group, pl.ds(at + half, HALF)], column, swizzled.at[warpgroup])
        return step

    walk(jnp.int32(E * tall * wide), describe, load, compute, ring)
