"""Attention on TPU: Helios's own kernels, forward and backward.

Queries and keys are rotated in the kernels; blocks that see nothing of each other are neither
fetched nor stepped over; residuals are q, k, v, the output and one float a row and head. The
kernels take [B heads T H]: the transpose around them folds into the projections' layouts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Num

from helios_jax.chips import CHIPS
from helios_jax.kernels.attention.tpu import backward_kernel, forward_kernel, work
from helios_jax.kernels.attention.tpu import blocks as sizes
from helios_jax.kernels.attention.tpu.backward_kernel import Inputs
from helios_jax.kernels.attention.tpu.layout import (
    heads_first,
    in_chunks,
    operands,
    pad,
    padded,
    tokens_first,
)
from helios_jax.kernels.attention.tpu.rows import Rows, mark, tables
from helios_jax.kernels.attention.tpu.tiles import LOG2E, MARKS
from helios_jax.kernels.attention.tpu.work import Blocks
from helios_jax.kernels.quantize import Stored


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
    sizes.generation()  # refuses a TPU that it does not know


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
    return rows, Options(window, softcap, *chosen, CHIPS[target].kernel_vmem_bytes, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(options: Options, q: Array, k: Array, v: Array, rows: Rows) -> Array:
    return run_forward(dataclasses.replace(options, residuals=''), q, k, v, rows)[0]


def forward_rule(options: Options, q: Array, k: Array, v: Array, rows: Rows) -> tuple[Array, Any]:
    # Under a remat policy that saves these two, backward does not run the forward kernel again.
    out, lse, kept = run_forward(options, q, k, v, rows)
    out, lse = checkpoint_name(out, 'attention_output'), checkpoint_name(lse, 'log_sum_exp')
    kept = tuple(checkpoint_name(x, name) for x, name in zip(kept, 'qkv', strict=False))
    return out, (*(kept or (q, k, v)), out, lse, rows)


def backward_rule(options: Options, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    q, k, v, out, lse, rows = saved
    if not options.residuals:
        q, k, v = operands(q, k, v)
    return *run_backward(options, q, k, v, out, lse, cotangent, rows), None


differentiable.defvjp(forward_rule, backward_rule)


def run_forward(
    options: Options, q: Array, k: Array, v: Array, rows: Rows
) -> tuple[Array, Array, tuple[Stored, ...]]:
    """(out, log-sum-exp, q, k and v as the options keep them or ())."""
    (B, T, N, _), S, blocks = q.shape, k.shape[1], options.forward
    queries, keys, values = operands(q, k, v)
    marks = mark(rows, T, S, blocks)
    q_table, k_table = tables(rows, *marks)
    kernel = functools.partial(
        forward_kernel.forward,
        listed=work.make(*marks, blocks, options.window, ordered=rows.key_positions is None),
        blocks=blocks,
        window=options.window,
        softcap=options.softcap,
        segmented=rows.segmented,
        residuals=options.residuals,
        vmem=options.vmem,
        interpret=options.interpret,
    )
    # In a jit, because jax takes dead ones out of a backward pass, but never a dead kernel: with
    # all of its results saved, q, k and v would have to be saved for it as well.
    out, lse, kept = jax.jit(kernel)(
        pad(queries, blocks.q, axis=-2),
        pad(keys, blocks.k, axis=-2),
        pad(values, blocks.k, axis=-2),
        jnp.swapaxes(q_table[:, :-MARKS], 1, 2),
        q_table[:, -MARKS:],
        k_table,
        rows.scale.reshape(1) * LOG2E,
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
    """As `backward`, of q [B K G T H], k and v [B K S H]: arrays or stored."""
    keys = k.payload if isinstance(k, Stored) else k
    (B, T, N, H), (K, S), blocks = out.shape, keys.shape[1:3], options.backward
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
    most = functools.partial(backward_kernel.keys_in_memory, out, blocks, options.vmem)
    total = k_table.shape[-1]
    if total <= most():
        listed = work.make(*marks, blocks, options.window, ordered=rows.key_positions is None)
        dq, dk, dv = kernel(inputs, listed=listed)
        return tokens_first(dq, T), tokens_first(dk, S), tokens_first(dv, S)

    chunk = -(-total // -(-total // most(in_chunks=True)) // blocks.k) * blocks.k
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
