"""A block: its shared memory, the ring between its warpgroups, and its way over the tasks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from helios_jax.kernels.grouped_matmul.hopper.tile import CHUNK, DEPTH, GRAIN, HALF

LOADER = 2  # index of the warpgroup that copies
MULTIPROCESSORS = 132  # of an H100 or H200, where a program is compiled without one
REGISTERS = {'loader': 40, 'multiplier': 232}  # a thread; those of three warpgroups fill 64 Ki
Transform: Any = plgpu  # some of jax's versions call these classes abstract
UNTILED = (Transform.SwizzleTransform(128),)
TILED = (Transform.TilingTransform((GRAIN, DEPTH)), *UNTILED)

Numbers = tuple[Array, ...]  # what describes a task, int32


class Buffers(NamedTuple):
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
    """Makes the function that runs body(*operands, out, Buffers) on every multiprocessor."""
    stages = 4 if columns == 256 else 6  # what fits into 227 KiB

    def smem(shape: tuple[int, ...], transforms: Any = ()) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    def ring(box: tuple[int, int], untiled: bool) -> Any:
        tiles = (box[0] // GRAIN, box[1] // DEPTH, GRAIN, DEPTH)
        other = smem((stages, *box), UNTILED) if untiled else smem((stages, *tiles))
        return plgpu.RefUnion(smem((stages, *box), TILED), other)

    chunks = (2, 2, HALF, CHUNK)
    scratch = Buffers(
        rows=ring(rows_box, untiled=rows_box[1] == DEPTH),
        columns=ring(columns_box, untiled=False),
        out=plgpu.RefUnion(smem(chunks, TILED), smem(chunks, UNTILED), smem(chunks)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    device = jax.devices()[0]

    def kernel(*references: Any, **memory: Any) -> None:
        body(*references, Buffers(**memory))

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
    memory: Buffers

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


class Kernel(NamedTuple):
    """Parts in which the two kernels differ."""

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
