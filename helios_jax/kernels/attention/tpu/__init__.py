"""Attention on TPU: Helios's own kernels, forward and backward.

Queries and keys are rotated in the kernels; blocks that see nothing of each other are neither
fetched nor stepped over; residuals are q, k, v, the output and one float a row and head. The
kernels take [B heads T H]: the transpose around them folds into the projections' layouts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Num

from helios_jax.kernels.attention.splash import RESIDUALS
from helios_jax.kernels.attention.tpu import backward_kernel, forward_kernel, work
from helios_jax.kernels.attention.tpu import blocks as sizes
from helios_jax.kernels.attention.tpu.backward_kernel import Inputs
from helios_jax.kernels.attention.tpu.tiles import LOG2E, MARKS
from helios_jax.kernels.attention.tpu.work import Blocks
from helios_jax.kernels.quantize import Stored


class Rows(NamedTuple):
    """Where queries and keys stand. Without segments and keys of their own, rows are causal."""

    positions: Array  # [B T]
    segment_ids: Array | None
    key_positions: Array | None  # [B S]
    key_segment_ids: Array | None
    frequencies: Array  # [R]
    scale: Array  # float32 scalar, of the logits

    @property
    def segmented(self) -> bool:
        return any(x is not None for x in self[1:4])


@dataclasses.dataclass(frozen=True)
class Options:
    """What the kernels are compiled for."""

    window: int
    softcap: float
    forward: Blocks
    backward: Blocks
    vmem: int  # bytes
    interpret: Any
    residuals: str = ''  # what q, k and v are kept as for backward: '' | fp8 | int8


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    residuals: str = '',
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
    **arguments: Any,
) -> Float[Array, 'B T N H']:
    """As `kernels.attention.attention`, on one device's arrays, whose other arguments it takes.

    Args:
      residuals: what backward reads of q, k and v: themselves, or as 'fp8' or 'int8', which the
        backward kernel restores block by block. The output does not change.
      interpret: run the kernels in Python on any device; `pltpu.InterpretParams` looks for races.
      blocks: of the forward and the backward kernel; by table unless given.
    Raises:
      NotImplementedError: H not a multiple of 32, or a dtype other than bfloat16 and float32.
    """
    rows, options = prepare(q, k, interpret=interpret, blocks=blocks, **arguments)
    options = dataclasses.replace(options, residuals=residuals)
    return differentiable(options, q, k, v, rows)


def forward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
    **arguments: Any,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N T']]:
    """(output, natural log-sum-exp of the logits in float32: −∞ where a query sees nothing).

    Arguments and errors are `attention`'s.
    """
    rows, options = prepare(q, k, interpret=interpret, blocks=blocks, **arguments)
    return run_forward(options, q, k, v, rows)[:2]


def backward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    out: Float[Array, 'B T N H'],
    lse: Float[Array, 'B N T'],
    cotangent: Float[Array, 'B T N H'],
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
    **arguments: Any,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """(dq, dk, dv) of unrotated q and k; `out` and `lse` may be over more keys than k holds.

    Arguments and errors are `attention`'s.
    """
    rows, options = prepare(q, k, interpret=interpret, blocks=blocks, **arguments)
    return run_backward(options, *operands(q, k, v), out, lse, cotangent, rows)


def check(q: Array) -> None:
    """Raises NotImplementedError for what the kernels cannot take."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f'cannot take {q.dtype}: only bfloat16 and float32.')
    if q.shape[-1] % 32:
        raise NotImplementedError(f'cannot take H={q.shape[-1]}: it must be a multiple of 32.')


def prepare(
    q: Array,
    k: Array,
    *,
    positions: Num[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None,
    key_positions: Num[Array, 'B S'] | None,
    key_segment_ids: Int[Array, 'B S'] | None,
    frequencies: Float[Array, 'R'],
    query_scale: float | Float[Array, ''],
    scale: float,
    window: int,
    softcap: float,
    interpret: Any,
    blocks: tuple[Blocks, Blocks] | None,
) -> tuple[Rows, Options]:
    check(q)
    (T, N, H), (S, K) = q.shape[1:], k.shape[1:3]
    target = sizes.generation()
    choose = functools.partial(sizes.choose, target, N // K, H, T, S, q.dtype == jnp.float32)
    chosen = blocks or (choose(backward=False), choose(backward=True))
    total = jnp.asarray(query_scale, jnp.float32) * scale
    rows = Rows(positions, segment_ids, key_positions, key_segment_ids, frequencies, total)
    return rows, Options(window, softcap, *chosen, sizes.VMEM[target], interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(options: Options, q: Array, k: Array, v: Array, rows: Rows) -> Array:
    return run_forward(options, q, k, v, rows)[0]


def forward_rule(options: Options, q: Array, k: Array, v: Array, rows: Rows) -> tuple[Array, Any]:
    # Under a remat policy that saves this name, backward does not run the forward kernel again.
    out, lse, kept = checkpoint_name(run_forward(options, q, k, v, rows), RESIDUALS)
    return out, (*(kept or (q, k, v)), out, lse, rows)


def backward_rule(options: Options, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    *qkv, out, lse, rows = saved
    qkv = qkv if options.residuals else operands(*qkv)
    return *run_backward(options, *qkv, out, lse, cotangent, rows), None


differentiable.defvjp(forward_rule, backward_rule)


def run_forward(
    options: Options, q: Array, k: Array, v: Array, rows: Rows
) -> tuple[Array, Array, tuple[Stored, ...]]:
    """(out, log-sum-exp, q, k and v as the options keep them or ())."""
    (B, T, N, _), S, blocks = q.shape, k.shape[1], options.forward
    queries, keys, values = operands(q, k, v)
    marks = mark(rows, T, S, blocks)
    q_table, k_table = tables(rows, *marks)
    out, lse, kept = forward_kernel.forward(
        pad(queries, blocks.q, axis=-2),
        pad(keys, blocks.k, axis=-2),
        pad(values, blocks.k, axis=-2),
        jnp.swapaxes(q_table[:, :-MARKS], 1, 2),
        q_table[:, -MARKS:],
        k_table,
        rows.scale.reshape(1) * LOG2E,
        work.make(*marks, blocks, options.window, ordered=rows.key_positions is None),
        blocks=blocks,
        window=options.window,
        softcap=options.softcap,
        segmented=rows.segmented,
        residuals=options.residuals,
        vmem=options.vmem,
        interpret=options.interpret,
    )
    kept = tuple(
        Stored(x.payload[..., :length, :], x.exponents[..., :length])
        for x, length in zip(kept, (T, S, S), strict=False)
    )
    return tokens_first(out, T), lse.reshape(B, N, -1)[:, :, :T], kept


def run_backward(
    options: Options,
    q: Array | Stored,
    k: Array | Stored,
    v: Array | Stored,
    out: Array,
    lse: Array,
    cotangent: Array,
    rows: Rows,
) -> tuple[Array, Array, Array]:
    """q [B K G T H], k and v [B K S H]: arrays, or stored. The rest and the results as `backward`'s."""
    (B, T, N, H), (K, S), blocks = out.shape, (k.payload if isinstance(k, Stored) else k).shape[1:3], options.backward
    queries, keys, values = padded(q, blocks.q), padded(k, blocks.k), padded(v, blocks.k)
    out, cotangent = (pad(heads_first(x, K), blocks.q, axis=-2) for x in (out, cotangent))
    # A query that saw nothing has −∞, and padding is such a query.
    lse = pad(lse, blocks.q, -jnp.inf).reshape(B, K, N // K, -1)
    kernel = functools.partial(
        backward_kernel.backward,
        scale=rows.scale.reshape(1) * LOG2E,
        blocks=blocks,
        window=options.window,
        softcap=options.softcap,
        segmented=rows.segmented,
        vmem=options.vmem,
        interpret=options.interpret,
    )
    marks = mark(rows, T, S, blocks)
    q_table, k_table = tables(rows, *marks)
    inputs = Inputs(queries, keys, values, out, lse, cotangent, q_table, k_table, ())
    most, total = backward_kernel.keys_in_memory(out, blocks, options.vmem), k_table.shape[-1]
    if total <= most:
        listed = work.make(*marks, blocks, options.window, ordered=rows.key_positions is None)
        dq, dk, dv = kernel(inputs, listed=listed)
        return tokens_first(dq, T), tokens_first(dk, S), tokens_first(dv, S)

    chunk = -(-total // -(-total // most) // blocks.k) * blocks.k
    q_marks, k_marks = (jnp.asarray(x, jnp.float32) for x in marks)

    def one(dq: Array, part: tuple[Any, ...]) -> tuple[Array, tuple[Array, ...]]:
        keys, values, marks, k_table = part
        listed = work.make(q_marks, marks, blocks, options.window, ordered=False)
        some = inputs._replace(k=keys, v=values, k_table=k_table, earlier=dq)
        dq, *gradients = kernel(some, listed=listed)
        return dq, tuple(gradients)

    cut = functools.partial(in_chunks, size=chunk)
    chunks = cut(keys, axis=-2), cut(values, axis=-2), cut(k_marks), cut(k_table)
    dq, gradients = jax.lax.scan(one, jnp.zeros(out.shape, jnp.float32), chunks)
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(B, K, -1, H) for x in gradients)
    return tokens_first(dq, T).astype(out.dtype), tokens_first(dk, S), tokens_first(dv, S)


def in_chunks(x: Array | Stored, size: int, axis: int = -1) -> Any:
    """An axis cut into chunks, which come first; the last is padded with zeros: no segment."""
    if isinstance(x, Stored):
        return Stored(in_chunks(x.payload, size, -2), in_chunks(x.exponents, size))
    x = pad(x, size, axis=axis)
    axis %= x.ndim
    cut = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def pad(x: Array, multiple: int, value: float = 0.0, axis: int = -1) -> Array:
    """With `value`, an axis to a multiple."""
    missing = -x.shape[axis] % multiple
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value) if missing else x


def padded(x: Any, multiple: int) -> Any:
    """The tokens of q, k or v to a multiple."""
    if not isinstance(x, Stored):
        return pad(x, multiple, axis=-2)
    return Stored(pad(x.payload, multiple, axis=-2), pad(x.exponents, multiple))


def operands(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return heads_first(q, k.shape[2]), heads_first(k), heads_first(v)


def heads_first(x: Array, K: int = 0) -> Array:
    """[B T N H] → [B K G T H], or [B T K H] → [B K T H] where K is 0."""
    B, T, N, H = x.shape
    return jnp.moveaxis(x.reshape(B, T, K, N // K, H) if K else x, 1, -2)


def tokens_first(x: Array, T: int) -> Array:
    """The inverse of `heads_first`."""
    x = jnp.moveaxis(x[..., :T, :], -2, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def plan(
    rows: Rows, T: int, S: int, blocks: Blocks, window: int
) -> tuple[work.Work, tuple[Array, Array]]:
    """The list of work, and the tables of queries and keys: float32 [B H+MARKS T or S], padded."""
    marks = mark(rows, T, S, blocks)
    listed = work.make(*marks, blocks, window, ordered=rows.key_positions is None)
    return listed, tables(rows, *marks)


def mark(rows: Rows, T: int, S: int, blocks: Blocks) -> tuple[Any, Any]:
    """Segments and positions of queries and keys: float32 [B 2 T or S], padded.

    In NumPy where the index alone says who sees whom: the list of work is then a constant, and the
    positions of padding at the end do no harm.
    """
    B = len(rows.positions)
    if not rows.segmented:
        queries, keys = np.arange(T + -T % blocks.q), np.arange(S + -S % blocks.k)
        return (
            np.stack([np.where(queries < T, 1, work.NOBODY), queries])[None].repeat(B, 0),
            np.stack([keys < S, np.where(keys < S, keys, work.FAR)])[None].repeat(B, 0),
        )
    segments = jnp.ones((B, T)) if rows.segment_ids is None else rows.segment_ids
    positions = rows.positions if rows.key_positions is None else rows.key_positions
    key_segments = rows.key_segment_ids
    if key_segments is None:
        key_segments = segments if rows.key_positions is None else jnp.ones((B, S))
    segments = jnp.where(segments > 0, segments, work.NOBODY)

    def stack(segments: Array, positions: Array, block: int, nobody: float, far: float) -> Array:
        padded = pad(segments, block, nobody), pad(positions, block, far)
        return jnp.stack([x.astype(jnp.float32) for x in padded], axis=1)

    return (
        stack(segments, rows.positions, blocks.q, work.NOBODY, 0.0),
        stack(key_segments, positions, blocks.k, 0.0, work.FAR),
    )


def tables(rows: Rows, q_marks: Any, k_marks: Any) -> tuple[Array, Array]:
    key_positions = rows.positions if rows.key_positions is None else rows.key_positions
    return (
        table(rows.positions, q_marks, rows.frequencies),
        table(key_positions, k_marks, rows.frequencies),
    )


def table(positions: Array, marks: Any, frequencies: Array) -> Array:
    """float32 [B H+MARKS T]: cosines, sines, segment ids, positions, zeros."""
    at = positions.astype(jnp.float32)
    at = jnp.pad(at, [(0, 0), (0, marks.shape[-1] - at.shape[-1])])
    angles = at[:, None] * frequencies.astype(jnp.float32)[None, :, None]
    spare = jnp.zeros((len(at), MARKS - 2, at.shape[-1]), jnp.float32)
    rows = jnp.cos(angles), jnp.sin(angles), jnp.asarray(marks, jnp.float32), spare
    return jnp.concatenate(rows, axis=1)
