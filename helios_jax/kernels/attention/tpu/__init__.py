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
from jaxtyping import Float, Float32

from helios_jax.chips import CHIPS
from helios_jax.kernels.attention.arguments import Setting, Tokens
from helios_jax.kernels.attention.tpu import backward_kernel, forward_kernel, work
from helios_jax.kernels.attention.tpu import blocks as sizes
from helios_jax.kernels.attention.tpu.backward_kernel import BackwardInputs
from helios_jax.kernels.attention.tpu.forward_kernel import ForwardInputs
from helios_jax.kernels.attention.tpu.layout import (
    heads_first,
    in_chunks,
    operands,
    pad,
    padded,
    tokens_first,
)
from helios_jax.kernels.attention.tpu.specs import MARKS, Static
from helios_jax.kernels.attention.tpu.tables import mark, position_tables
from helios_jax.kernels.attention.tpu.tiles import LOG2E
from helios_jax.kernels.attention.tpu.work import Blocks
from helios_jax.kernels.quantize import Stored


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of both kernels, which are static: each choice compiles again."""

    forward: Blocks
    backward: Blocks
    vmem: int  # bytes
    interpret: Any
    residuals: str = ''  # form in which q, k and v are kept for backward: '' | fp8 | int8


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    tokens: Tokens,
    setting: Setting,
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
    residuals: str = '',
) -> Float[Array, 'B T N H']:
    """Computes `kernels.attention.attention` on one device's arrays.

    Args:
      interpret: run the kernels in Python on any device; `pltpu.InterpretParams` looks for races.
      blocks: sizes for the forward and the backward kernel, in place of the table's.
      residuals: form of q, k and v that backward reads: '', or 'fp8' or 'int8', which the
        backward kernel decodes block by block. The output does not change.
    """
    options = dataclasses.replace(options_for(q, k, interpret, blocks), residuals=residuals)
    return differentiable(options, q, k, v, tokens, one_factor(setting))


def forward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    tokens: Tokens,
    setting: Setting,
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
) -> tuple[Float[Array, 'B T N H'], Float32[Array, 'B N T']]:
    """Returns (output, natural log-sum-exp of the logits, −∞ where a query sees nothing).

    Arguments are `attention`'s.
    """
    options = options_for(q, k, interpret, blocks)
    return run_forward(options, q, k, v, tokens, one_factor(setting))[:2]


def backward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    out: Float[Array, 'B T N H'],
    lse: Float32[Array, 'B N T'],
    cotangent: Float[Array, 'B T N H'],
    tokens: Tokens,
    setting: Setting,
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """Returns (dq, dk, dv), unrotated; `out` and `lse` may be over more keys than k holds.

    Arguments are `attention`'s.
    """
    options, setting = options_for(q, k, interpret, blocks), one_factor(setting)
    return run_backward(options, *operands(q, k, v), out, lse, cotangent, tokens, setting)


def options_for(
    q: Array, k: Array, interpret: Any, blocks: tuple[Blocks, Blocks] | None
) -> Options:
    (T, N, H), (S, K) = q.shape[1:], k.shape[1:3]
    target = sizes.generation()
    choose = functools.partial(sizes.choose, target, N // K, H, T, S, q.dtype == jnp.float32)
    chosen = blocks or (choose(backward=False), choose(backward=True))
    return Options(*chosen, CHIPS[target].kernel_vmem_bytes, interpret)


def one_factor(setting: Setting) -> Setting:
    """Merges both scales of a setting into one float32, by which the kernels multiply q."""
    factor = jnp.asarray(setting.query_scale, jnp.float32) * setting.logit_scale
    return setting._replace(query_scale=factor, scale=1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(
    options: Options, q: Array, k: Array, v: Array, tokens: Tokens, setting: Setting
) -> Array:
    return run_forward(dataclasses.replace(options, residuals=''), q, k, v, tokens, setting)[0]


def forward_rule(
    options: Options, q: Array, k: Array, v: Array, tokens: Tokens, setting: Setting
) -> tuple[Array, Any]:
    # Under a remat policy that saves these two, backward does not run the forward kernel again.
    out, lse, kept = run_forward(options, q, k, v, tokens, setting)
    out, lse = checkpoint_name(out, 'attention_output'), checkpoint_name(lse, 'log_sum_exp')
    kept = tuple(checkpoint_name(x, name) for x, name in zip(kept, 'qkv', strict=False))
    return out, (*(kept or (q, k, v)), out, lse, tokens, setting)


def backward_rule(options: Options, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    q, k, v, out, lse, tokens, setting = saved
    if not options.residuals:
        q, k, v = operands(q, k, v)
    gradients = run_backward(options, q, k, v, out, lse, cotangent, tokens, setting)
    return *gradients, None, None


differentiable.defvjp(forward_rule, backward_rule)


def run_forward(
    options: Options, q: Array, k: Array, v: Array, tokens: Tokens, setting: Setting
) -> tuple[Array, Array, tuple[Stored, ...]]:
    """Returns (out, log-sum-exp, q, k and v as the options keep them or ())."""
    (B, T, N, _), S, blocks = q.shape, k.shape[1], options.forward
    queries, keys, values = operands(q, k, v)
    marks = mark(tokens, T, S, blocks)
    q_table, k_table = position_tables(tokens, setting.frequencies, *marks)
    static = Static(blocks, setting.window, setting.softcap, not tokens.plain, options.residuals)
    kernel = functools.partial(
        forward_kernel.forward,
        listed=work.make(*marks, blocks, setting.window, ordered=tokens.own_keys),
        static=static,
        vmem=options.vmem,
        interpret=options.interpret,
    )
    inputs = ForwardInputs(
        pad(queries, blocks.q, axis=-2),
        pad(keys, blocks.k, axis=-2),
        pad(values, blocks.k, axis=-2),
        jnp.swapaxes(q_table[:, :-MARKS], 1, 2),
        q_table[:, -MARKS:],
        k_table,
    )
    # JAX's dead-code elimination removes an unused jit call, but not an unused pallas_call. Without
    # the jit, where all of its results are saved, q, k and v would be saved only to feed it.
    out, lse, kept = jax.jit(kernel)(inputs, jnp.reshape(setting.query_scale, 1) * LOG2E)
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
    tokens: Tokens,
    setting: Setting,
) -> tuple[Array, Array, Array]:
    """Runs `backward` on q [B K G T H], k and v [B K S H]: arrays or `Stored`."""
    keys = k.payload if isinstance(k, Stored) else k
    (B, T, N, H), (K, S), blocks = out.shape, keys.shape[1:3], options.backward
    queries, keys, values = padded(q, blocks.q), padded(k, blocks.k), padded(v, blocks.k)
    out, cotangent = (pad(heads_first(x, K), blocks.q, axis=-2) for x in (out, cotangent))
    # A query that saw nothing has −∞, and padding is such a query.
    lse = pad(lse, blocks.q, -jnp.inf).reshape(B, K, N // K, -1)
    kernel = functools.partial(
        backward_kernel.backward,
        scale=jnp.reshape(setting.query_scale, 1) * LOG2E,
        static=Static(blocks, setting.window, setting.softcap, not tokens.plain),
        vmem=options.vmem,
        interpret=options.interpret,
    )
    marks = mark(tokens, T, S, blocks)
    q_table, k_table = position_tables(tokens, setting.frequencies, *marks)
    inputs = BackwardInputs(queries, keys, values, out, lse, cotangent, q_table, k_table, ())
    most = functools.partial(backward_kernel.keys_in_memory, out, blocks, options.vmem)
    total = k_table.shape[-1]
    if total <= most():
        listed = work.make(*marks, blocks, setting.window, ordered=tokens.own_keys)
        dq, dk, dv = kernel(inputs, listed=listed)
        return tokens_first(dq, T), tokens_first(dk, S), tokens_first(dv, S)

    size = -(-total // -(-total // most(in_chunks=True)) // blocks.k) * blocks.k
    q_marks, k_marks = (jnp.asarray(x, jnp.float32) for x in marks)

    def one(dq: Array, chunk: tuple[Any, ...]) -> tuple[Array, tuple[Array, ...]]:
        keys, values, marks, k_table = chunk
        listed = work.make(q_marks, marks, blocks, setting.window, ordered=False)
        some = inputs._replace(k=keys, v=values, k_table=k_table, earlier=dq)
        dq, *gradients = kernel(some, listed=listed)
        return dq, tuple(gradients)

    cut = functools.partial(in_chunks, size=size)
    chunks = cut(keys, axis=-2), cut(values, axis=-2), cut(k_marks), cut(k_table)
    dq, gradients = jax.lax.scan(one, jnp.zeros(out.shape, jnp.float32), chunks)
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(B, K, -1, H) for x in gradients)
    return tokens_first(dq, T).astype(out.dtype), tokens_first(dk, S), tokens_first(dv, S)
