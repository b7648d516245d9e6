"""The gated mix and the norm behind it in one pass over memory, in Pallas for TPU.

A grid step takes a block of whole rows, and sweeps over their columns in VMEM: for the mean squares
of the norms, then for what depends on them. The gate's logits are products of the MXU on the way.
Gradients of weights add up in VMEM, for each core its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from helios_jax.chips import CHIPS, MIB
from helios_jax.kernels.attention.tpu.blocks import generation
from helios_jax.kernels.cost import estimate
from helios_jax.kernels.gated_norm.operands import Factors, Gradients, Mix, Mixed, MixOperands

FORWARD, BACKWARD = 'helios_gated_norm', 'helios_gated_norm_gradient'
LANES = 128
ROWS = (256, 128, 64, 32, 16)  # of a block: the most that divide the tokens and fit
VALUES = 2**19  # of a block of the stream, at most
TILE_ROWS, COLUMNS = 32, 512  # of a tile, at most: 16 registers
SUBLANES = 8
VMEM = 48 * MIB
MATRIX = 2**21  # values of the gate's, at most: it and its gradient stay in VMEM
SUMS = ('d_out', 'd_vector', 'd_scale', 'd_next_scale')  # of weights
TOKENS = ('x', 'update', 'hidden', 'd_stream', 'd_normalized')  # cut into blocks of rows
Ref = Any


def refusal(given: MixOperands, num_tokens: int) -> str:
    """Reason why the kernel cannot take so many tokens of these; '' if it can."""
    D = given.x.shape[-1]
    if given.x.dtype != jnp.bfloat16 or D % LANES:
        return (
            f'the kernel takes bfloat16 and widths in multiples of {LANES}, no {given.x.dtype} '
            f'{D} wide.'
        )
    if given.hidden is not None and given.out is None:
        return "the kernel makes a gate's logits itself, and takes none."
    if given.out is not None and given.out.size > MATRIX:
        return f"the kernel takes up to {MATRIX} values of a gate's matrix, not {given.out.shape}."
    if not rows_of(generation(), num_tokens, D):
        return f'the kernel has no blocks that divide {num_tokens} tokens of width {D}.'
    return ''


def rows_of(target: str, num_tokens: int, width: int) -> int:
    """Chooses the rows of a block on a chip; 0: none of ROWS divides the tokens of each core."""
    fitting = [rows for rows in ROWS if rows * width <= VALUES or rows == ROWS[-1]]
    each = CHIPS[target].num_cores
    return next((rows for rows in fitting if num_tokens % (rows * each) == 0), 0)


def tile_rows(rows: int) -> int:
    return min(rows, TILE_ROWS)


def tile_columns(width: int) -> int:
    return math.gcd(width, COLUMNS)


def forward(mix: Mix, given: MixOperands, *, interpret: Any = False) -> Mixed:
    """Computes the new stream, and what the norm behind it makes of it."""
    results = {'stream': given.x}
    if given.next_scale is not None:
        results['normalized'] = given.x
    body = functools.partial(forward_kernel, mix)
    made: dict[str, Any] = call(body, given.arrays(), results, {}, FORWARD, interpret)
    return Mixed(**made)


def forward_kernel(mix: Mix, refs: dict[str, Ref]) -> None:
    D = refs['x'].shape[1]
    open_gate(mix, refs)
    measure_update(mix, refs)

    def mix_in(r: Any, c: Any) -> tuple[Array, ...]:
        y = mixed(mix, refs, r, c)[-1].astype(refs['x'].dtype)
        refs['stream'][r, c] = y
        return (jnp.square(y.astype(jnp.float32)),)

    (squares,) = sweep(refs, 1, mix_in)
    if 'normalized' not in refs:
        return
    spread(refs, 'next_factor', jax.lax.rsqrt(squares / D + refs['next_eps'][0, 0]))

    def normalize(r: Any, c: Any) -> tuple[Array, ...]:
        y = refs['stream'][r, c].astype(jnp.float32)
        normal = y * of_rows(refs, 'next_factor', r, c) * refs['next_scale'][:, c]
        refs['normalized'][r, c] = normal.astype(refs['normalized'].dtype)
        return ()

    sweep(refs, 0, normalize)


def sweep(
    refs: dict[str, Ref], sums: int, step: Callable[[Any, Any], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Takes a step for each tile of rows and columns; returns rows' sums of what steps return.

    Tiles are small, so that what a step computes stays in registers.
    """
    rows, D = refs['x'].shape
    height, width = tile_rows(rows), tile_columns(D)
    zeros = jnp.zeros((height, LANES), jnp.float32)

    def down(j: Any, _: None) -> None:
        r = pl.ds(pl.multiple_of(j * height, height), height)

        def across(i: Any, lanes: tuple[Array, ...]) -> tuple[Array, ...]:
            values = step(r, pl.ds(pl.multiple_of(i * width, width), width))
            parts = [jnp.split(value, width // LANES, axis=1) for value in values]
            return tuple(sum(own, start) for start, own in zip(lanes, parts, strict=True))

        lanes = jax.lax.fori_loop(0, D // width, across, (zeros,) * sums)
        for number, own in enumerate(lanes):
            refs['lanes'][number, r, :] = own

    jax.lax.fori_loop(0, rows // height, down, None)
    # All rows at once: a sum over lanes takes long, and many take no longer.
    return tuple(jnp.sum(refs['lanes'][n], axis=1, keepdims=True) for n in range(sums))


def spread(refs: dict[str, Ref], name: str, values: Array) -> None:
    """Keeps a number for each row, in all lanes."""
    refs[name][...] = jnp.broadcast_to(values, refs[name].shape)


def of_rows(refs: dict[str, Ref], name: str, r: Any, c: Any) -> Array:
    return jnp.tile(refs[name][r, :], (1, c.size // LANES))


def open_gate(mix: Mix, refs: dict[str, Ref]) -> None:
    """Computes the gate of the block's rows, if it depends on them."""
    if 'out' not in refs:
        return
    logits = product(refs['hidden'][...], refs['out'][...], 1, 0)
    refs['gate'][...] = sigmoid(logits + refs['vector'][...])


def sigmoid(x: Array) -> Array:
    """Takes one operation of the transcendental unit, where 1 / (1 + exp(−x)) takes two.

    Float32's rounding near −1 leaves it 3e-8 off: 0.4% of a gate at 8e-6, as bfloat16 would.
    """
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def measure_update(mix: Mix, refs: dict[str, Ref]) -> None:
    """Keeps 1 / rms(u) of each row, if the update is normalised."""
    if 'scale' not in refs:
        return
    D = refs['x'].shape[1]
    squares = sum(
        jnp.square(refs['update'][:, start : start + LANES].astype(jnp.float32))
        for start in range(0, D, LANES)
    )
    squares = jnp.sum(squares, axis=1, keepdims=True)
    spread(refs, 'factor', jax.lax.rsqrt(squares / D + mix.eps))


def mixed(mix: Mix, refs: dict[str, Ref], r: Any, c: Any) -> tuple[Array, Array, Array, Array]:
    """Returns a tile of x, u, û and the new stream."""
    x, update = refs['x'][r, c].astype(jnp.float32), refs['update'][r, c].astype(jnp.float32)
    u = update
    if 'scale' in refs:
        update = u * of_rows(refs, 'factor', r, c) * refs['scale'][:, c]
    added = update - x if mix.interpolates else update
    gate = gate_of(mix, refs, r, c)
    return x, u, update, x + (added if gate is None else gate * added)


def gate_of(mix: Mix, refs: dict[str, Ref], r: Any, c: Any) -> Array | None:
    """Returns a tile of the gate, or the one row that serves all."""
    if 'out' in refs:
        return refs['gate'][r, c]
    if 'vector' not in refs:
        return None
    return sigmoid(refs['vector'][:, c]) if mix.sigmoid else refs['vector'][:, c]


def product(a: Array, b: Array, axis: int, other: int) -> Array:
    """Multiplies a with b over these axes, in float32."""
    dims = (((axis,), (other,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def backward(
    mix: Mix,
    given: MixOperands,
    factors: Factors,
    d_stream: Array,
    d_normalized: Array | None,
    *,
    interpret: Any = False,
) -> Gradients:
    """Computes the gradients of all operands; it computes the factors again."""
    arrays = given.arrays() | {'d_stream': d_stream}
    if d_normalized is not None:
        arrays['d_normalized'] = d_normalized
    results = {'d_x': given.x, 'd_update': given.x}
    if given.hidden is not None:
        results['d_hidden'] = given.hidden
    weights = [name for name in ('out', 'vector', 'scale', 'next_scale') if name in arrays]
    sums = {f'd_{name}': arrays[name] for name in weights}
    body = functools.partial(backward_kernel, mix)
    made = call(body, arrays, results, sums, BACKWARD, interpret)
    return Gradients(**{name.removeprefix('d_'): array for name, array in made.items()})


def backward_kernel(mix: Mix, refs: dict[str, Ref]) -> None:
    D = refs['x'].shape[1]
    add = functools.partial(add_up, refs)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for name in SUMS:
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    open_gate(mix, refs)
    measure_update(mix, refs)
    if 'd_normalized' in refs:

        def look(r: Any, c: Any) -> tuple[Array, ...]:
            y = refs['y'][r, c] = mixed(mix, refs, r, c)[-1]
            d_normal = refs['d_normalized'][r, c].astype(jnp.float32)
            return jnp.square(y), d_normal * refs['next_scale'][:, c] * y

        squares, along = sweep(refs, 2, look)
        next_factor = jax.lax.rsqrt(squares / D + refs['next_eps'][0, 0])
        spread(refs, 'next_factor', next_factor)
        # what y loses along itself, for the norm does not see its length
        spread(refs, 'back', along * next_factor**3 / D)

    def differentiate(r: Any, c: Any) -> tuple[Array, ...]:
        x, u = refs['x'][r, c].astype(jnp.float32), refs['update'][r, c].astype(jnp.float32)
        d_y = refs['d_stream'][r, c].astype(jnp.float32)
        if 'd_normalized' in refs:
            y, d_normal = refs['y'][r, c], refs['d_normalized'][r, c].astype(jnp.float32)
            normal = d_normal * of_rows(refs, 'next_factor', r, c)
            add('d_next_scale', c, normal * y)
            d_y = d_y + normal * refs['next_scale'][:, c] - y * of_rows(refs, 'back', r, c)
        elif 'vector' in refs and mix.sigmoid:
            y = mixed(mix, refs, r, c)[-1]
        gate = gate_of(mix, refs, r, c)
        d_update = d_y if gate is None else d_y * gate  # of û
        d_x = d_y - d_update if mix.interpolates else d_y
        refs['d_x'][r, c] = d_x.astype(jnp.bfloat16)
        if gate is not None:
            if mix.sigmoid:  # its slope is g (1 − g), and y − x is g times what it lets in
                d_gate = (y - x) * (d_y - d_update)
            else:
                d_gate = d_y * mixed(mix, refs, r, c)[2]
            add('d_vector', c, d_gate)
            if 'out' in refs:
                refs['d_logits'][r, c] = d_gate.astype(jnp.bfloat16)
        if 'scale' not in refs:
            refs['d_update'][r, c] = d_update.astype(jnp.bfloat16)
            return ()
        factor = of_rows(refs, 'factor', r, c)
        along = d_update * u
        add('d_scale', c, along * factor)
        refs['d_bar'][r, c] = d_update * refs['scale'][:, c] * factor  # of ū, times 1 / rms(u)
        return (along * refs['scale'][:, c],)

    slope = sweep(refs, int('scale' in refs), differentiate)
    if 'scale' in refs:
        spread(refs, 'back', slope[0] * refs['factor'][:, :1] ** 3 / D)

        for start in range(0, D, COLUMNS):
            c = pl.ds(start, min(COLUMNS, D - start))
            u = refs['update'][:, c].astype(jnp.float32)
            d_update = refs['d_bar'][:, c] - u * of_rows(refs, 'back', slice(None), c)
            refs['d_update'][:, c] = d_update.astype(jnp.bfloat16)
    if 'out' in refs:
        d_hidden = product(refs['d_logits'][...], refs['out'][...], 1, 1)
        refs['d_hidden'][...] = d_hidden.astype(refs['d_hidden'].dtype)
        refs['d_out'][...] += product(refs['hidden'][...], refs['d_logits'][...], 0, 0)


def add_up(refs: dict[str, Ref], name: str, c: Any, values: Array) -> None:
    """Adds a tile to a vector's gradient; its eight sublanes are added up at the end."""
    parts = jnp.split(values, values.shape[0] // SUBLANES, axis=0)
    refs[name][:, c] += sum(parts[1:], parts[0])


def call(
    body: Any,
    arrays: dict[str, Array],
    results: dict[str, Array],
    sums: dict[str, Array],
    name: str,
    interpret: Any,
) -> dict[str, Array]:
    """Runs a kernel on blocks of rows.

    Args:
      arrays: what it reads; those of `TOKENS` in blocks.
      results: arrays like those that it writes in blocks.
      sums: arrays like those that every block adds to, in float32.
    """
    (N, D), target = arrays['x'].shape, generation()
    rows, cores = rows_of(target, N, D), CHIPS[target].num_cores
    steps = N // rows // cores
    matrix = lambda a: a if a.ndim == 2 else a.reshape(1, -1)
    arrays = {key: matrix(array) for key, array in arrays.items()}
    whole = lambda a: pl.BlockSpec(a.shape, lambda core, step: (0, 0))
    block = lambda a: pl.BlockSpec((rows, a.shape[1]), lambda core, step: (core * steps + step, 0))
    placed = {key: (block if key in TOKENS else whole)(array) for key, array in arrays.items()}
    if 'next_eps' in arrays:
        placed['next_eps'] = pl.BlockSpec(memory_space=pltpu.SMEM)
    of_sublanes = lambda a: a if a.ndim == 2 else jnp.zeros((SUBLANES, D))
    totals = {key: jax.eval_shape(of_sublanes, array) for key, array in sums.items()}
    of_core = lambda a: pl.BlockSpec((None, *a.shape), lambda core, step: (core, 0, 0))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results.values()]
    shapes += [jax.ShapeDtypeStruct((cores, *a.shape), jnp.float32) for a in totals.values()]
    scratch = {name: pltpu.VMEM((rows, LANES), jnp.float32) for name in ('factor', 'next_factor')}
    scratch['lanes'] = pltpu.VMEM((2, rows, LANES), jnp.float32)
    scratch['gate'] = pltpu.VMEM((rows, D), jnp.float32)
    if sums:
        scratch['back'] = scratch['factor']
        scratch['d_bar'] = scratch['y'] = scratch['gate']
        scratch['d_logits'] = pltpu.VMEM((rows, D), jnp.bfloat16)
    names = (*arrays, *results, *sums, *scratch)
    rank = arrays['out'].shape[0] if 'out' in arrays else 0
    run = pl.pallas_call(
        lambda *refs: body(dict(zip(names, refs, strict=True))),
        grid=(cores, steps),
        in_specs=list(placed.values()),
        out_specs=[*map(block, results.values()), *map(of_core, totals.values())],
        out_shape=shapes,
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM
        ),
        cost_estimate=estimate(
            (6 if sums else 2) * rank * N * D, (arrays, results), transcendentals=N * D
        ),
        interpret=interpret,
        name=name,
    )
    made = dict(zip((*results, *sums), run(*arrays.values()), strict=True))
    total = lambda array, a: jnp.sum(array, axis=0 if a.ndim == 2 else (0, 1))
    return made | {key: total(made[key], a) for key, a in sums.items()}
