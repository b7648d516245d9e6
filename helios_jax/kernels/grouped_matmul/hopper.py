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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

DEPTH = 64  # of a step; a row of it fills the 128 bytes over which a copy swizzles
CHUNK = 64  # columns that are stored at a time
HALF = 64  # rows of the tile that one warpgroup multiplies
ROWS = 2 * HALF
GRAIN = 8  # rows of a tile of the swizzle
BAND = 16  # row tiles that tasks walk down before the next column tile
LOADER = 2  # index of the warpgroup that copies
MULTIPROCESSORS = 132  # of an H100 or H200, where a program is compiled without one
REGISTERS = {'loader': 40, 'multiplier': 232}  # a thread; those of three warpgroups fill 64 Ki
UNTILED = (plgpu.SwizzleTransform(128),)
TILED = (plgpu.TilingTransform((GRAIN, DEPTH)), *UNTILED)

Numbers = tuple[Array, ...]  # what describes a task, int32


def multiply(
    rows: Float[Array, 'M D'],
    weights: Float[Array, 'E D F'],
    group_sizes: Int[Array, 'E'],
    *,
    transposed: bool = False,
) -> Float[Array, 'M F']:
    """Multiplies the rows of group e by weights[e], or by its transpose: then [M F] gives [M D].

    Rows are sorted by group. Those beyond the sum of the sizes belong to no group: they are not
    read, and their results are zeros. Accumulates in float32. Weights are read where they lie.

    Raises:
      NotImplementedError: dtype, sizes or GPU that the kernel cannot take.
    """
    check(rows, weights)
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

    Raises:
      NotImplementedError: dtype, sizes or GPU that the kernel cannot take.
    """
    check(rows, gradient)
    (M, D), F, E = rows.shape, gradient.shape[1], group_sizes.shape[0]
    # The arrays are copied where their rows do not fill tiles of the swizzle.
    if extra := max(DEPTH, pl.cdiv(M, GRAIN) * GRAIN) - M:
        rows, gradient = (jnp.pad(x, ((0, extra), (0, 0))) for x in (rows, gradient))
    sizes = group_sizes.astype(jnp.int32)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    # Tasks are dealt out in turn. From the largest group to the smallest, all blocks get the same.
    order = jnp.argsort(-sizes).astype(jnp.int32)
    columns = columns_of(F)
    return launch(
        weight_products,
        jax.ShapeDtypeStruct((E, D, F), rows.dtype),
        (DEPTH, ROWS),
        (DEPTH, columns),
        columns,
    )(order, starts[order], sizes[order], rows, gradient)


def check(rows: Array, other: Array) -> None:
    """Refuses what the kernels cannot take."""
    for x in (rows, other):
        if x.dtype != jnp.bfloat16:
            raise NotImplementedError(f'multiplies bfloat16, not {x.dtype}.')
    for size in (*rows.shape[1:], *other.shape[1:]):
        if size % ROWS:
            raise NotImplementedError(f'needs widths that {ROWS} divides, not {size}.')
    device = jax.devices()[0]
    if device.platform == 'gpu' and (found := device.compute_capability) != '9.0':
        raise NotImplementedError(f'needs a Hopper GPU (9.0), not compute capability {found}.')


def columns_of(width: int) -> int:
    """Columns of a tile, which divide the result's width."""
    return 256 if width % 256 == 0 else 128


def work_list(
    group_sizes: Int[Array, 'E'], M: int
) -> tuple[Int[Array, 'tiles 3'], Int[Array, '1']]:
    """Lists row tiles as (group, first row, rows), one after another, and counts them.

    Rows of no group are those of a group E, whose tiles contract over nothing.
    """
    E = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, M - jnp.sum(sizes, dtype=jnp.int32))
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    tiles = -(-sizes // ROWS)
    ends_of_tiles = jnp.cumsum(tiles, dtype=jnp.int32)
    tile = jnp.arange(M // ROWS + E + 1, dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= ends_of_tiles[None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, E)  # entries after the last tile are not used
    first = starts[group] + (tile - (ends_of_tiles - tiles)[group]) * ROWS
    first = jnp.maximum(jnp.minimum(first, ends[group] - ROWS), starts[group])
    work = jnp.stack([group, first, jnp.minimum(ends[group] - first, ROWS)], axis=1)
    return work, ends_of_tiles[-1:]


class Memory(NamedTuple):
    """Shared memory and barriers of a block.

    Operands and the result have several views of the same bytes. An operand of wgmma is `tiled`.
    A copy whose array is seen as tiles must begin at a multiple of GRAIN rows; an `untiled` view,
    the same where one tile is as wide as the view, may begin at any row. `plain` is what lies
    there: GRAIN rows of a tile, each 64 numbers, swizzled within the row.
    """

    rows: Any  # tiled; then untiled (row_products), or plain (weight_products)
    columns: Any  # tiled, plain
    out: Any  # of each multiplier, two chunks: tiled, untiled, plain
    full: Any  # a slot of the ring holds a step's operands
    empty: Any  # both multipliers are done with a slot


def launch(
    body: Any,
    out: jax.ShapeDtypeStruct,
    rows_box: tuple[int, int],
    columns_box: tuple[int, int],
    columns: int,
) -> Any:
    """Makes the function that runs body(*operands, out, Memory) on every multiprocessor."""
    stages = 4 if columns == 256 else 6  # what fits into 227 KiB

    def smem(shape: tuple[int, ...], transforms: Any = ()) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    def ring(box: tuple[int, int], untiled: bool) -> Any:
        tiles = (box[0] // GRAIN, box[1] // DEPTH, GRAIN, DEPTH)
        other = smem((stages, *box), UNTILED) if untiled else smem((stages, *tiles))
        return plgpu.RefUnion(smem((stages, *box), TILED), other)

    chunks = (2, 2, HALF, CHUNK)
    scratch = Memory(
        rows=ring(rows_box, untiled=rows_box[1] == DEPTH),
        columns=ring(columns_box, untiled=False),
        out=plgpu.RefUnion(smem(chunks, TILED), smem(chunks, UNTILED), smem(chunks)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    device = jax.devices()[0]

    def kernel(*references: Any, **memory: Any) -> None:
        body(*references, Memory(**memory))

    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch._asdict(),
        grid=(device.core_count if device.platform == 'gpu' else MULTIPROCESSORS,),
        grid_names=('block',),
        num_threads=3,
        thread_name='warpgroup',
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


class Ring(NamedTuple):
    """Slots of shared memory that the loader fills and both multipliers empty, step by step."""

    rows: Any
    columns: Any
    memory: Memory

    @property
    def num_slots(self) -> int:
        return self.rows.shape[0]

    def slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.num_slots))

    def fill(self, step: Array, rows: Any, columns: Any) -> None:
        """Copies a step's operands as soon as its slot is empty."""
        slot = self.slot(step)
        full, empty = self.memory.full.at[slot], self.memory.empty.at[slot]
        pl.when(step >= self.num_slots)(lambda: plgpu.barrier_wait(empty))
        plgpu.copy_gmem_to_smem(rows, self.rows.at[slot], full)
        plgpu.copy_gmem_to_smem(columns, self.columns.at[slot], full)

    def free(self, step: Array) -> None:
        plgpu.barrier_arrive(self.memory.empty.at[self.slot(step)])

    def drain(self, step: Array) -> None:
        """Waits until every slot is empty, so that no barrier is left in use."""
        for back in range(1, self.num_slots + 1):
            empty = self.memory.empty.at[self.slot(step - back)]
            pl.when(step >= back)(functools.partial(plgpu.barrier_wait, empty))

    def contract(
        self,
        step: Array,
        num_steps: Array,
        least: int,
        shape: tuple[int, int],
        multiply: Any,
        meanwhile: list[Any],
    ) -> tuple[Array, Array]:
        """Sums multiply(acc, slot, k) over a tile's steps; returns the sum and the next step.

        The acts of `meanwhile` are done one by one while each of the first steps is at work.

        Args:
          num_steps: 0, or at least `least`.
        """
        early = max(len(meanwhile) - least, 0)

        def one(acc: Any, k: Array, step: Array, act: Any = None) -> Array:
            slot = self.slot(step)
            plgpu.barrier_wait(self.memory.full.at[slot])
            multiply(acc, slot, k)
            if act:
                act()
            plgpu.wgmma_wait(1)  # the step before is done with its slot
            pl.when(k > 0)(lambda: self.free(step - 1))
            return step + 1

        def sum_up(acc: Any, step: Array) -> tuple[Array, Array]:
            for k, act in enumerate(meanwhile[early:]):
                step = one(acc, jnp.int32(k), step, act)
            rest = lambda k, step: one(acc, k, step)
            step = lax.fori_loop(len(meanwhile) - early, num_steps, rest, step)
            value = acc[...]
            self.free(step - 1)
            return value.astype(jnp.bfloat16), step

        def some(step: Array) -> tuple[Array, Array]:
            for act in meanwhile[:early]:
                act()
            return pl.run_scoped(lambda acc: sum_up(acc, step), plgpu.ACC(shape, jnp.float32))

        def none(step: Array) -> tuple[Array, Array]:
            for act in meanwhile:
                act()
            # Not an accumulator's: with them, ptxas would wait for each product of `some`.
            return zeros(shape), step

        return lax.cond(num_steps > 0, some, none, step)


def zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.bfloat16), plgpu.Layout.WGMMA)


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


class Kernel(NamedTuple):
    """What the two kernels differ in."""

    num_tasks: Array
    describe: Any  # task → Numbers
    load: Any  # (Numbers, step) → next step; the loader's part
    compute: Any  # (Numbers, step, meanwhile) → half a tile, whether to store it, next step
    target: Any  # Numbers → reference of the half tile's rows in the result, first column
    shape: tuple[int, int]  # of half a tile

    def run(self, ring: Ring) -> None:
        """Walks over every so many-th task, each warpgroup doing its part."""
        warpgroup = lax.axis_index('warpgroup')

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS['loader'], action='decrease')
            ring.drain(self.walk(self.load, jnp.int32(0)))

        @pl.when(warpgroup != LOADER)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS['multiplier'], action='increase')
            self.multiply(*(view.at[warpgroup] for view in ring.memory.out[:2]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def walk(self, act: Any, state: Any) -> Any:
        """Folds act(numbers, state) over this block's tasks."""
        block, num_blocks = lax.axis_index('block'), lax.axis_size('block')

        def numbers(i: Array) -> Numbers:
            return self.describe(jnp.minimum(block + i * num_blocks, self.num_tasks - 1))

        def body(i: Array, carry: tuple[Numbers, Any]) -> tuple[Numbers, Any]:
            ahead = numbers(i + 1)  # read while this task is at work
            return ahead, act(carry[0], carry[1])

        num_own = lax.div(self.num_tasks - block + num_blocks - 1, num_blocks)
        return lax.fori_loop(0, num_own, body, (numbers(jnp.int32(0)), state))[1]

    def multiply(self, tiled: Any, untiled: Any) -> None:
        """Computes this warpgroup's half tiles, and stores each while the next is computed."""

        def stores(value: Array, numbers: Numbers, wanted: Array) -> list[Any]:
            out, column = self.target(numbers)

            def store(chunk: int) -> None:
                at = chunk * CHUNK
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                tiled[chunk % 2] = value[:, at : at + CHUNK]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(untiled.at[chunk % 2], out.at[:, pl.ds(column + at, CHUNK)])

            act = lambda chunk: lambda: pl.when(wanted)(lambda: store(chunk))
            return [act(chunk) for chunk in range(self.shape[1] // CHUNK)]

        def body(numbers: Numbers, state: Any) -> Any:
            step, *last = state
            value, wanted, step = self.compute(numbers, step, stores(*last))
            return step, value, numbers, wanted

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.describe(jnp.int32(0)))
        state = self.walk(body, (jnp.int32(0), zeros(self.shape), nothing, jnp.bool_(False)))
        for act in stores(*state[1:]):
            act()


def row_products(
    work: Any,
    count: Any,
    rows: Any,
    weights: Any,
    out: Any,
    memory: Memory,
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
            tile = plgpu.transpose_ref(tile, (1, 0)) if transposed else tile
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


def weight_products(
    order: Any, starts: Any, sizes: Any, rows: Any, gradient: Any, out: Any, memory: Memory
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
            plgpu.wgmma(acc, plgpu.transpose_ref(own, (1, 0)), columns_tiled.at[slot])

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
