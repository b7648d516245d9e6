"""Permutation of bfloat16 rows on TPU, a DMA a row.

Rows of a bfloat16 array lie in pairs, which share 32-bit words, and in tiles with their neighbours:
a single row is in many places. `pack` makes each row one stretch of memory: its first half of the
columns in the low, its second half in the high 16 bits of 32-bit words, 128 words a sublane. A copy
is then one DMA, which takes 4 to 5 cycles to start; the rows of the next grid step are on their way
while those of this one are taken apart.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, UInt32

from helios_jax.chips import CHIPS, MIB
from helios_jax.kernels.attention.tpu.blocks import generation
from helios_jax.kernels.cost import estimate

PACK, TAKE, TAKE_SUMS = 'helios_rows_pack', 'helios_rows_take', 'helios_rows_take_sums'
LANES, SUBLANES = 128, 8
ROWS = (512, 256, 128, 64, 32, 16)  # of the result that a grid step makes: the most that fit
COPIED = 512  # rows that are copied for them, at most
BUFFERS = 8 * MIB  # VMEM for rows on their way: those of two grid steps
UNROLLED = 16  # DMAs that a turn of the loop issues
HIGH = 0xFFFF0000
XLA_IS_FAST = 'tpu7x'  # there XLA has the SparseCores gather
Ref = Any


def refusal(x: Float[Array, 'N D'], length: int, summed: int) -> str:
    """Reason why the kernels do not make `length` rows, each a sum of rows of x; '' if they do."""
    target, (N, D) = generation(), x.shape
    if target == XLA_IS_FAST:
        return 'there XLA has the SparseCores gather.'
    if x.dtype != jnp.bfloat16:
        return f'the kernel cannot take {x.dtype}: only bfloat16.'
    if D % (2 * LANES):
        return f'the kernel cannot take a width of {D}: it must be a multiple of {2 * LANES}.'
    if not rows_a_step(D, N, 1, 1) or not rows_a_step(D, length, summed, CHIPS[target].num_cores):
        return f'the kernel has no steps that divide {length} rows and {N}.'
    return ''


def rows_a_step(width: int, length: int, summed: int, cores: int) -> int:
    """Chooses the rows of the result that a grid step makes; 0: none of ROWS divides them."""
    row_bytes = sublanes(width) * LANES * 4
    for rows in ROWS:
        copied = rows * summed
        fits = copied <= COPIED and 2 * copied * row_bytes <= BUFFERS
        if fits and length % (rows * cores) == 0:
            return rows
    return 0


def sublanes(width: int) -> int:
    """Sublanes of a packed row, of 128 words each, with those that only fill a tile."""
    return -(-width // (2 * LANES) // SUBLANES) * SUBLANES


def pack(x: Float[Array, 'N D'], *, interpret: Any = False) -> UInt32[Array, 'N_sublanes 128']:
    """Lays each row in one stretch of memory (see above)."""
    N, D = x.shape
    rows, height = rows_a_step(D, N, 1, 1), sublanes(D)
    result = jax.ShapeDtypeStruct((N * height, LANES), jnp.uint32)
    return pl.pallas_call(
        pack_kernel,
        grid=(N // rows,),
        in_specs=[pl.BlockSpec((rows, D), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((rows * height, LANES), lambda i: (i, 0)),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel',), vmem_limit_bytes=4 * BUFFERS
        ),
        cost_estimate=estimate(0, (x, result)),
        interpret=interpret,
        name=PACK,
    )(x)


def pack_kernel(x: Ref, out: Ref) -> None:
    (rows, D), height = x.shape, sublanes(x.shape[1])
    words = lambda part: jax.lax.bitcast_convert_type(part.astype(jnp.float32), jnp.uint32)
    for s in range(D // (2 * LANES)):
        low, high = x[:, columns(s)], x[:, columns(s, D // 2)]
        out[pl.ds(s, rows, stride=height), :] = (words(low) >> 16) | words(high)


def columns(s: int, first: int = 0) -> slice:
    return slice(first + s * LANES, first + (s + 1) * LANES)


def take(
    x: Float[Array, 'N D'], index: Int[Array, 'M'], *, interpret: Any = False
) -> Float[Array, 'M D']:
    """Computes `permutation.take`."""
    return _copied(x, index[:, None], TAKE, interpret)


def take_sums(
    x: Float[Array, 'N D'], index: Int[Array, 'A X'], *, interpret: Any = False
) -> Float[Array, 'A D']:
    """Computes `permutation.take_sums`."""
    return _copied(x, index, TAKE_SUMS, interpret)


def _copied(x: Array, index: Array, name: str, interpret: Any) -> Array:
    """Sums the rows that each row of the index [A X] names."""
    (N, D), (length, summed), height = x.shape, index.shape, sublanes(x.shape[1])
    cores = CHIPS[generation()].num_cores
    rows = rows_a_step(D, length, summed, cores)
    steps, copied = length // rows // cores, rows * summed
    # Those of a step together, the first ones of all its sums, then the second ones; the size of a
    # block of scalars is a power of two.
    ordered = jnp.clip(index, 0, N - 1).reshape(-1, rows, summed).swapaxes(1, 2)
    ordered = jnp.pad(ordered.reshape(-1, copied), ((0, 0), (0, COPIED - copied)))
    result = jax.ShapeDtypeStruct((length, D), x.dtype)
    indices = lambda ahead: pl.BlockSpec(
        (COPIED,),
        lambda c, i: (c * steps + jnp.minimum(i + ahead, steps - 1),),
        memory_space=pltpu.SMEM,
    )
    run = pl.pallas_call(
        functools.partial(kernel, summed),
        grid=(cores, steps),
        in_specs=[indices(0), indices(1), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((rows, D), lambda c, i: (c * steps + i, 0)),
        out_shape=result,
        scratch_shapes=[
            pltpu.VMEM((2, copied * height, LANES), jnp.uint32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        # Indices are within bounds; to check each copy's would take five times as long as to start
        # it.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'),
            vmem_limit_bytes=4 * BUFFERS,
            disable_bounds_checks=True,
        ),
        cost_estimate=estimate(0, (result, *[result] * summed)),
        interpret=interpret,
        name=name,
    )

    # JAX's dead-code elimination removes an unused jit call, but not an unused pallas_call.
    @jax.jit
    def packed_and_copied(x: Array, at: Array) -> Array:
        packed = pack(x, interpret=interpret)
        if not interpret:
            # XLA would put a small array in VMEM, where nothing copies a row at once.
            packed = pltpu.with_memory_space_constraint(packed, pltpu.HBM)
        return run(at, at, packed)

    return packed_and_copied(x, ordered.reshape(-1))


def kernel(
    summed: int, now: Ref, later: Ref, packed: Ref, out: Ref, buffer: Ref, arrived: Ref
) -> None:
    """Makes the rows of one step, while those of the next are copied."""
    (rows, D), height = out.shape, sublanes(out.shape[1])
    step, slot = pl.program_id(1), jax.lax.rem(pl.program_id(1), 2)
    copied = rows * summed

    def stretch(row: Any) -> Any:
        return pl.ds(pl.multiple_of(row * height, height), height)

    def start(index: Ref, into: Any) -> None:
        def some(turn: Any, _: None) -> None:
            for place in range(UNROLLED):
                row = turn * UNROLLED + place
                pltpu.make_async_copy(
                    packed.at[stretch(index[row])], buffer.at[into, stretch(row)], arrived.at[into]
                ).start()

        jax.lax.fori_loop(0, copied // UNROLLED, some, None)

    @pl.when(step == 0)
    def _() -> None:
        start(now, 0)

    @pl.when(step + 1 < pl.num_programs(1))
    def _() -> None:
        start(later, 1 - slot)

    # One wait for the bytes of them all.
    everything = buffer.at[slot]
    pltpu.make_async_copy(everything, everything, arrived.at[slot]).wait()
    value = lambda word: jax.lax.bitcast_convert_type(word, jnp.float32)
    for s in range(D // (2 * LANES)):
        every = [
            buffer[slot, pl.ds(one * rows * height + s, rows, stride=height), :]
            for one in range(summed)
        ]
        low = functools.reduce(jnp.add, [value(words << 16) for words in every])
        high = functools.reduce(jnp.add, [value(words & jnp.uint32(HIGH)) for words in every])
        out[:, columns(s)] = low.astype(out.dtype)
        out[:, columns(s, D // 2)] = high.astype(out.dtype)
