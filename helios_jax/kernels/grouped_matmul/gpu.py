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
UNTILED = (plgpu.SwizzleTransform(128),)
TILED = (plgpu.TilingTransform((8, DEPTH)), *UNTILED)


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
    D, F, E = rows.shape[1], gradient.shape[1], group_sizes.shape[0]
    tiling = tiling or Tiling(columns=256 if F % 256 == 0 else 128, stages=4, pair=1, width=16)
    M = rows.shape[0]
    extra = max(DEPTH, -(-M // 8) * 8) - M  # the array is cut into tiles of eight rows
    if extra:
        rows, gradient = (jnp.pad(x, ((0, extra), (0, 0))) for x in (rows, gradient))
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
    rows_smem, columns_smem, out_smem = (
        functools.partial(plgpu.SMEM, shape, jnp.bfloat16)
        for shape in ((stages, *rows_box), (stages, *columns_box), (2, 2, HALF, CHUNK))
    )
    scratch = {
        # Two views of the same bytes: a copy whose array is cut into tiles of eight rows must
        # begin at such a tile, an operand of wgmma must be cut so. One tile across, they agree.
        'rows_smem': plgpu.RefUnion(rows_smem(transforms=TILED), rows_smem(transforms=UNTILED))
        if rows_box[1] == DEPTH
        else rows_smem(transforms=TILED),
        'columns_smem': columns_smem(transforms=TILED),
        # The pieces of a small group lie in rows as they are, in the same memory.
        'out_smem': plgpu.RefUnion(
            out_smem(transforms=TILED), out_smem(transforms=UNTILED), out_smem()
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

    def contract(
        self, step: Array, num_steps: Array, least: int, multiply: Any, meanwhile: list[Any]
    ) -> tuple[Array, Array]:
        """Sums multiply(acc, slot, k) over a tile's steps; returns the sum and the next step.

        The acts of `meanwhile` are done one by one while each of the first steps is at work.

        Args:
          num_steps: 0, or at least `least`.
        """
        early = max(len(meanwhile) - least, 0)

        def one(acc: Any, k: Any, step: Array, act: Any = None) -> Array:
            slot = self.slot(step)
            plgpu.barrier_wait(self.full.at[slot])
            multiply(acc, slot, k)
            if act is not None:
                act()
            plgpu.wgmma_wait(1)  # the step before is done with its slot
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(self.empty.at[self.slot(step - 1)]))
            return step + 1

        def sum_up(acc: Any, step: Array) -> tuple[Array, Array]:
            for k, act in enumerate(meanwhile[early:]):
                step = one(acc, jnp.int32(k), step, act)
            rest = lambda k, step: one(acc, k, step)
            step = lax.fori_loop(len(meanwhile) - early, num_steps, rest, step)
            value = acc[...]
            plgpu.barrier_arrive(self.empty.at[self.slot(step - 1)])
            return value.astype(jnp.bfloat16), step

        def some(step: Array) -> tuple[Array, Array]:
            for act in meanwhile[:early]:
                act()
            acc = plgpu.ACC((HALF, self.tiling.columns), jnp.float32)
            return pl.run_scoped(lambda acc: sum_up(acc, step), acc)

        def none(step: Array) -> tuple[Array, Array]:
            for act in meanwhile:
                act()
            # Not an accumulator's: with them, ptxas would wait for each product of `some`.
            return zeros(self.tiling.columns), step

        return lax.cond(num_steps > 0, some, none, step)


def zeros(columns: int) -> Array:
    """A half of a tile that holds zeros."""
    return plgpu.layout_cast(jnp.zeros((HALF, columns), jnp.bfloat16), plgpu.Layout.WGMMA)


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


def walk(num_tasks: Array, describe: Any, load: Any, multiplier: Any, ring: Ring) -> None:
    """Gives each block every so many-th task: the loader loads, the multipliers multiply.

    What describes a task is read from memory while the task before it is at work.
    """
    block, num_blocks = lax.axis_index('block'), lax.axis_size('block')
    num_own = lax.div(num_tasks - block + num_blocks - 1, num_blocks)

    def loop(act: Any, state: Any) -> Any:
        def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            task, state = carry
            ahead = describe(jnp.minimum(block + (i + 1) * num_blocks, num_tasks - 1))
            return ahead, act(task, state)

        first = describe(jnp.minimum(block, num_tasks - 1))
        return lax.fori_loop(0, num_own, body, (first, state))[1]

    @pl.when(lax.axis_index('warpgroup') == LOADER)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS['loader'], action='decrease')
        ring.drain(loop(load, jnp.int32(0)))

    @pl.when(lax.axis_index('warpgroup') != LOADER)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS['multiplier'], action='increase')
        multiplier(loop)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def multiplier(
    loop: Any, ring: Ring, numbers: int, compute: Any, target: Any, tiled: Any, untiled: Any
) -> None:
    """Computes one warpgroup's tiles, and stores each while the next one is computed.

    Args:
      numbers: how many describe a task.
      compute: (task, step, meanwhile) → the tile in bfloat16, whether to store it, the next step.
      target: task → the reference of the tile in the result, and its first column.
    """
    columns = ring.tiling.columns

    def stores(value: Array, task: Any, wanted: Array) -> list[Any]:
        out, column = target(task)

        def store(chunk: int) -> None:
            at = chunk * CHUNK
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            tiled[chunk % 2] = value[:, at : at + CHUNK]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(untiled.at[chunk % 2], out.at[:, pl.ds(column + at, CHUNK)])

        def act(chunk: int) -> Any:
            return lambda: pl.when(wanted)(lambda: store(chunk))

        return [act(chunk) for chunk in range(columns // CHUNK)]

    def body(task: Any, state: Any) -> Any:
        step, *last = state
        value, wanted, step = compute(task, step, stores(*last))
        return step, value, task, wanted

    zero = jnp.int32(0)
    _, *last = loop(body, (zero, zeros(columns), (zero,) * numbers, jnp.bool_(False)))
    for act in stores(*last):
        act()


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
        store_plain(smem, value[:, chunk * CHUNK : (chunk + 1) * CHUNK])
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
    warpgroup = lax.axis_index('warpgroup')
    tiled, untiled, plain = (view.at[warpgroup] for view in out_smem)
    rows_tiled, rows_untiled = rows_smem
    ring = Ring(rows_untiled, columns_smem, full, empty, tiling)
    num_columns = pl.cdiv(out.shape[1], tiling.columns)
    num_rows = count[0]
    half = warpgroup * HALF
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

    def skipped() -> Array:
        return half + of_pair if tiling.pair > 1 else half

    def compute(task: tuple[Array, ...], step: Array, meanwhile: Any) -> tuple[Array, ...]:
        group, first, size, column = task

        def multiply(acc: Any, slot: Array, k: Array) -> None:
            tile = columns_smem.at[slot]
            tile = plgpu.transpose_ref(tile, (1, 0)) if transposed else tile
            plgpu.wgmma(acc, rows_tiled.at[slot, pl.ds(half, HALF)], tile)

        value, step = ring.contract(step, num_steps(group), depth, multiply, meanwhile)
        own = jnp.clip(size - skipped(), 0, HALF)

        @pl.when((own > 0) & (own < HALF))
        def _() -> None:
            store_rows(value, out, first + skipped(), own, column, plain.at[0])

        return value, own == HALF, step

    def target(task: tuple[Array, ...]) -> tuple[Any, Array]:
        _, first, _, column = task
        return out.at[pl.ds(first + skipped(), HALF)], column

    walk(
        num_rows * num_columns,
        describe,
        load,
        lambda loop: multiplier(loop, ring, 4, compute, target, tiled, untiled),
        ring,
    )


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
    warpgroup = lax.axis_index('warpgroup')
    tiled, untiled, _ = (view.at[warpgroup] for view in out_smem)
    least = tiling.columns // CHUNK
    tall, wide = pl.cdiv(D, ROWS * tiling.pair), pl.cdiv(F, tiling.columns)
    half = warpgroup * HALF
    of_pair = lax.axis_index('pair') * ROWS if tiling.pair > 1 else 0

    def describe(task: Array) -> tuple[Array, ...]:
        group = lax.div(task, jnp.int32(tall * wide))
        start = starts[group]
        # A copy begins at a multiple of eight rows, at most seven of which are another group's.
        before = lax.rem(start, jnp.int32(8))
        size = sizes[group]
        return group, start - before, before, size, lax.rem(task, jnp.int32(tall * wide))

    def corner(task: tuple[Array, ...]) -> tuple[Array, Array]:
        tile, column = place(task[-1], tall, wide, tiling.width)
        return tile * (ROWS * tiling.pair) + of_pair, column * tiling.columns

    def num_steps(before: Array, size: Array) -> Array:
        # So many that each store has a step to hide behind: the rows of the last are all blank.
        steps = lax.div(before + size + DEPTH - 1, jnp.int32(DEPTH))
        return jnp.where(size > 0, jnp.maximum(steps, least), 0)

    def load(task: tuple[Array, ...], step: Array) -> Array:
        _, start, before, size, _ = task
        at, column = corner(task)

        def fill(k: Array, step: Array) -> Array:
            along = pl.ds(start + k * DEPTH, DEPTH)
            ring.fill(
                step,
                rows.at[along, pl.ds(at, ROWS)],
                gradient.at[along, pl.ds(column, tiling.columns)],
            )
            return step + 1

        return lax.fori_loop(0, num_steps(before, size), fill, step)

    def compute(task: tuple[Array, ...], step: Array, meanwhile: Any) -> tuple[Array, ...]:
        _, _, before, size, _ = task

        def blank(tile: Any, k: Array) -> None:
            """Zeroes rows of other groups: not by multiplication, for 0 · NaN is NaN."""
            value = plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
            row = row + k * DEPTH
            own = (row >= before) & (row < before + size)
            tile[...] = jnp.where(own, value, jnp.bfloat16(0))

        def multiply(acc: Any, slot: Array, k: Array) -> None:
            own = rows_smem.at[slot, :, pl.ds(half, HALF)]

            @pl.when((k * DEPTH < before) | ((k + 1) * DEPTH > before + size))
            def _() -> None:
                blank(own, k)
                share = tiling.columns // 2
                for at in range(0, share, CHUNK):
                    blank(columns_smem.at[slot, :, pl.ds(warpgroup * share + at, CHUNK)], k)
                plgpu.commit_smem()
                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)

            plgpu.wgmma(acc, plgpu.transpose_ref(own, (1, 0)), columns_smem.at[slot])

        value, step = ring.contract(step, num_steps(before, size), least, multiply, meanwhile)
        return value, jnp.bool_(True), step

    def target(task: tuple[Array, ...]) -> tuple[Any, Array]:
        at, column = corner(task)
        return out.at[task[0], pl.ds(at + half, HALF)], column

    walk(
        jnp.int32(E * tall * wide),
        describe,
        load,
        lambda loop: multiplier(loop, ring, 5, compute, target, tiled, untiled),
        ring,
    )
