"""The gated mix and the norm behind it in one pass over memory, for NVIDIA GPUs (Triton).

A program takes one row after another, and holds all of a row in registers: memory is read once and
written once. What is summed over rows adds up in registers too. The gate's logits are a product of
XLA's, in a pass of its own: a Tensor Core multiplies 16 rows or more, which registers do not hold.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from helios_jax.kernels.gated_norm.operands import Factors, Gradients, Mix, Mixed, MixOperands

ROWS = 32  # of a program that adds up gradients
SUMS = 2**20  # values of the parts of a long sum, at most
VALUES = 512  # of a row that a warp holds
MOST_WARPS = 16
LEAST = 64  # D must be a multiple
MOST = 8192  # D: more values than registers hold
INDEXED = 2**31  # values that a 32-bit index reaches
Ref = Any
ROW = ('x', 'update', 'logits', 'd_stream', 'd_normalized')  # what has a row for each token
FACTORS = ('update_factor', 'stream_factor')  # what has a number
Row = tuple[Array, ...]  # a row in pieces, whose sizes are powers of two


def refusal(given: MixOperands, num_tokens: int) -> str:
    """Reason why the kernel cannot take so many tokens of these; '' if it can."""
    D, dtype = given.x.shape[-1], given.x.dtype
    if dtype != jnp.bfloat16 or num_tokens * D >= INDEXED:
        return (
            f'the kernel takes bfloat16 and up to {INDEXED - 1} values, no {num_tokens} tokens of '
            f'{D} values in {dtype}.'
        )
    if D % LEAST or D > MOST:
        return f'the kernel takes widths in multiples of {LEAST} up to {MOST}, not {D}.'
    return ''


def pieces(width: int) -> list[Any]:
    """Cuts a row into slices of powers of two, the only sizes that Triton knows."""
    powers = [bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    starts = [sum(2**other for other in powers if other > bit) for bit in powers]
    return [pl.ds(start, 2**bit) for start, bit in zip(starts, powers, strict=True)]


def each(function: Callable[..., Array], *rows: Row) -> Row:
    return tuple(map(function, *rows))


def total(function: Callable[..., Array], *rows: Row) -> Array:
    """Sums a function of rows over their columns."""
    return functools.reduce(jnp.add, map(jnp.sum, each(function, *rows)))


class RowArrays:
    """References to every array by name, and what both directions do with them."""

    def __init__(self, mix: Mix, arrays: dict[str, Array], refs: dict[str, Ref]) -> None:
        self.refs, self.mix, self.arrays = refs, mix, arrays
        self.width = arrays['x'].shape[1]
        self.pieces = pieces(self.width)
        vectors = ('vector', 'scale', 'next_scale')
        self.vectors = {name: self.wide(self.load(name)) for name in vectors if name in refs}

    def load(self, name: str, *index: Any) -> Row:
        return tuple(triton.load(self.refs[name].at[*index, p]) for p in self.pieces)

    def wide(self, row: Row) -> Row:
        return each(lambda v: v.astype(jnp.float32), row)

    def store(self, name: str, index: Any, row: Row) -> None:
        ref = self.refs[name]
        for piece, value in zip(self.pieces, row, strict=True):
            triton.store(ref.at[index, piece], value.astype(ref.dtype))

    def inverse_rms(self, row: Row, eps: Any) -> Array:
        return jax.lax.rsqrt(total(lambda v: v * v, row) / self.width + eps)

    def gate(self, logits: Row | None) -> Row | None:
        if 'vector' not in self.vectors:
            return None
        vector = self.vectors['vector']
        if not self.mix.sigmoid:
            return vector
        logits = vector if logits is None else each(jnp.add, logits, vector)
        return each(lambda z: 1 / (1 + jnp.exp(-z)), logits)

    def normalized(self, row: Row, factor: Array | None, scale: str) -> Row:
        """Returns a row as its norm does; as it is without a norm."""
        if scale not in self.vectors:
            return row
        return each(lambda v, s: v * factor * s, row, self.vectors[scale])

    def mixed(self, x: Row, update: Row, gate: Row | None) -> Row:
        """Returns the new stream, rounded as it is stored."""
        if gate is None:
            y = each(jnp.add, x, update)
        elif self.mix.interpolates:
            y = each(lambda v, u, g: v + g * (u - v), x, update, gate)
        else:
            y = each(lambda v, u, g: v + g * u, x, update, gate)
        return each(lambda v: v.astype(jnp.bfloat16).astype(jnp.float32), y)


def forward(mix: Mix, given: MixOperands, *, interpret: bool = False) -> Mixed:
    """Computes the new stream, and what the norm behind it makes of it.

    With such a norm the factors of both are handed on. Without one the backward pass needs nothing
    of this call, and may leave it out.
    """
    arrays = operands(given)
    of_row = jax.ShapeDtypeStruct(given.x.shape[:1], jnp.float32)
    normalizes = given.next_scale is not None
    results: dict[str, Any] = {'stream': given.x}
    if normalizes:
        results |= {'normalized': given.x, 'stream_factor': of_row}
        results |= {'update_factor': of_row} if given.scale is not None else {}

    def body(refs: dict[str, Ref]) -> None:
        kernel = RowArrays(mix, arrays, refs)
        index = pl.program_id(0)
        row = {name: kernel.wide(kernel.load(name, index)) for name in ROW if name in arrays}
        update = row['update']
        if given.scale is not None:
            factor = kernel.inverse_rms(update, mix.eps)
            update = kernel.normalized(update, factor, 'scale')
            if normalizes:
                triton.store(refs['update_factor'].at[index], factor)
        y = kernel.mixed(row['x'], update, kernel.gate(row.get('logits')))
        kernel.store('stream', index, y)
        if normalizes:
            factor = kernel.inverse_rms(y, triton.load(refs['next_eps']))
            triton.store(refs['stream_factor'].at[index], factor)
            kernel.store('normalized', index, kernel.normalized(y, factor, 'next_scale'))

    made = call(body, arrays, results, len(given.x), 'gated_norm', interpret)
    factors = Factors(made.pop('update_factor', None), made.pop('stream_factor', None))
    return Mixed(**made, factors=factors)


def backward(
    mix: Mix,
    given: MixOperands,
    factors: Factors,
    d_stream: Array,
    d_normalized: Array | None,
    *,
    interpret: bool = False,
) -> Gradients:
    """Computes the gradients of all operands.

    Args:
      factors: as `forward` made them.
    """
    arrays: dict[str, Any] = operands(given) | {'d_stream': d_stream}
    arrays.pop('next_eps', None)
    if d_normalized is not None:
        arrays |= {'d_normalized': d_normalized, 'stream_factor': factors.stream}
    if factors.update is not None:
        arrays['update_factor'] = factors.update
    N, D = given.x.shape
    rows = math.gcd(N, ROWS)
    results: dict[str, Any] = {'d_x': given.x, 'd_update': given.x}
    if given.hidden is not None:
        results['d_logits'] = given.x
    vectors = [n for n in ('vector', 'scale', 'next_scale') if getattr(given, n) is not None]
    results |= {f'd_{n}': jax.ShapeDtypeStruct((N // rows, D), jnp.float32) for n in vectors}

    def body(refs: dict[str, Ref]) -> None:
        kernel = RowArrays(mix, arrays, refs)
        program = pl.program_id(0)

        def step(index: Any, row: dict[str, Any], totals: Any) -> Any:
            terms, found = gradients(kernel, row)
            for name, value in found.items():
                kernel.store(name, index, value)
            return {n: each(jnp.add, t, terms[n]) for n, t in totals.items()}

        zeros = tuple(jnp.zeros(piece.size, jnp.float32) for piece in kernel.pieces)
        totals = walk(kernel, program * rows, rows, step, dict.fromkeys(vectors, zeros))
        for name, row in totals.items():
            kernel.store(f'd_{name}', program, row)

    found = call(body, arrays, results, N // rows, 'gated_norm_gradient', interpret)
    found |= {f'd_{n}': jnp.sum(found[f'd_{n}'], axis=0) for n in vectors}
    if given.hidden is not None:
        d_logits = found.pop('d_logits')
        found['d_hidden'] = d_logits
        if given.out is not None:
            found['d_hidden'] = jnp.einsum('nd,rd->nr', d_logits, given.out)
            found['d_out'] = product_of_rows(given.hidden, d_logits)
    return Gradients(**{name.removeprefix('d_'): array for name, array in found.items()})


def walk(
    kernel: RowArrays,
    first: Any,
    rows: int,
    step: Callable[[Any, dict[str, Any], dict[str, Row]], dict[str, Row]],
    totals: dict[str, Row],
) -> dict[str, Row]:
    """Takes a step for each row, while the next one's is on its way; returns the last totals."""
    names = [name for name in (*ROW, *FACTORS) if name in kernel.arrays]

    def fetched(index: Any) -> dict[str, Any]:
        one = lambda name: triton.load(kernel.refs[name].at[index])
        return {n: one(n) if n in FACTORS else kernel.load(n, index) for n in names}

    def body(i: Array, carry: Any) -> Any:
        totals, row = carry
        following = fetched(first + jnp.minimum(i + 1, rows - 1))
        return step(first + i, row, totals), following

    start = totals, fetched(first)
    return jax.lax.fori_loop(0, rows, body, start)[0]


def gradients(kernel: RowArrays, row: dict[str, Any]) -> tuple[dict[str, Row], dict[str, Row]]:
    """Computes a row's terms of the gradients of vectors, and its own gradients."""
    mix, vectors = kernel.mix, kernel.vectors
    terms, found = {}, {}
    wide = {name: kernel.wide(row[name]) for name in ROW if name in row}
    x, u, d_y = wide['x'], wide['update'], wide['d_stream']
    factor = row.get('update_factor')
    if factor is None and 'scale' in vectors:
        factor = kernel.inverse_rms(u, mix.eps)
    update, gate = kernel.normalized(u, factor, 'scale'), kernel.gate(wide.get('logits'))
    if 'd_normalized' in row:
        y = kernel.mixed(x, update, gate)
        given = wide['d_normalized'], y, row['stream_factor'], vectors['next_scale']
        terms['next_scale'], through = through_norm(*given)
        d_y = each(jnp.add, d_y, through)
    d_update = d_y if gate is None else each(jnp.multiply, d_y, gate)  # of û
    found['d_x'] = each(jnp.subtract, d_y, d_update) if mix.interpolates else d_y
    if gate is not None:
        other = each(jnp.subtract, update, x) if mix.interpolates else update
        slope = (lambda d, o, g: d * o * g * (1 - g)) if mix.sigmoid else (lambda d, o, g: d * o)
        terms['vector'] = each(slope, d_y, other, gate)
        if 'logits' in row:
            found['d_logits'] = terms['vector']
    if factor is not None:
        terms['scale'], d_update = through_norm(d_update, u, factor, vectors['scale'])
    return terms, found | {'d_update': d_update}


def through_norm(d_normal: Row, x: Row, factor: Array, scale: Row) -> tuple[Row, Row]:
    """Returns gradients of a norm's scale and of its input x, whose 1 / rms is the factor.

    What goes along x is lost, for the norm does not see its length.
    """
    width = sum(part.size for part in x)
    weighted = each(jnp.multiply, d_normal, scale)
    along = total(jnp.multiply, weighted, x) * factor**3 / width
    d_x = each(lambda d, v: d * factor - v * along, weighted, x)
    return each(lambda d, v: d * v * factor, d_normal, x), d_x


def product_of_rows(a: Float[Array, 'N W'], b: Float[Array, 'N D']) -> Float[Array, 'W D']:
    """Multiplies a's transpose with b, in float32.

    The result is small and the sum long: XLA's product would occupy a few of the card's processors.
    """
    wanted = max(SUMS // (a.shape[1] * b.shape[1]), 1)
    parts = math.gcd(len(a), 2 ** (wanted.bit_length() - 1))
    a, b = (x.reshape(parts, -1, x.shape[1]) for x in (a, b))
    return jnp.sum(jnp.einsum('pnw,pnd->pwd', a, b, preferred_element_type=jnp.float32), axis=0)


def operands(given: MixOperands) -> dict[str, Array]:
    """Returns what a kernel reads: the logits in the place of the gate's hidden and its matrix."""
    arrays = given.arrays()
    out, hidden = arrays.pop('out', None), arrays.pop('hidden', None)
    if hidden is not None:
        arrays['logits'] = hidden if out is None else jnp.einsum('nr,rd->nd', hidden, out)
    return arrays


def call(
    body: Callable[[dict[str, Ref]], None],
    arrays: dict[str, Array],
    results: dict[str, Any],
    programs: int,
    name: str,
    interpret: bool,
) -> dict[str, Array]:
    """Runs `body` with a reference for each array and each result."""
    names, D = (*arrays, *results), arrays['x'].shape[1]
    warps = min(max(D // VALUES, 1), MOST_WARPS)
    warps = 2 ** (warps - 1).bit_length()
    made = pl.pallas_call(
        lambda *refs: body(dict(zip(names, refs, strict=True))),
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results.values()],
        compiler_params=triton.CompilerParams(num_warps=warps),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict(zip(results, made, strict=True))
