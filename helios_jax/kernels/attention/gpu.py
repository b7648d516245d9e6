"""Attention on NVIDIA: cuDNN's fused kernels, rotated outside the kernel.

Plain causal rows go through jax's public function. Packed rows need jax's private one, which
takes the start and the length of each segment, skips what lies outside the segments, and
leaves those rows of its results unwritten. Its softmax statistics [B·M N T] and the gradients that
it adds up [B·M T N H] grow with the most segments M that a row may have, so M is a small constant
and longer lists take several calls.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jaxtyping import Bool, Float, Int

from helios_jax.arch.buffers import CUDNN_SEGMENTS
from helios_jax.kernels.attention.arguments import Setting, Tokens
from helios_jax.kernels.attention.rotation import rotate

Call = Callable[..., Array]  # call_cudnn with its scale and window

PACKED_CUDNN = 90600  # 9.6
# Before this version the private function strides over keys with the queries' head count.
GROUPED_PACKING = (0, 11, 2)


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    tokens: Tokens,
    setting: Setting,
) -> Float[Array, 'B T N H']:
    """Computes `kernels.attention.attention` on one device's arrays.

    Raises:
      NotImplementedError: keys other than the queries' own tokens, a soft cap, a head size that
        cuDNN refuses, no cuDNN; packed rows on a GPU older than Hopper.
    """
    B, T, N, H = q.shape
    window = setting.window
    if not tokens.own_keys:
        raise NotImplementedError('cannot take key_positions: it masks by index.')
    if setting.softcap:
        raise NotImplementedError('has no soft cap.')
    if B * T * N * H >= 2**31:
        raise NotImplementedError(f'counts elements in int32: q {q.shape} has too many.')
    if T % 2:
        # cuDNN has no backward for odd lengths. No query sees the key that is added: it comes after
        # them all, and is padding where there are segments.
        pad: Any = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
        q, k, v, tokens = jax.tree.map(pad, (q, k, v, tokens))
    try:
        version = cudnn.check_cudnn_version()
    except RuntimeError as error:
        raise NotImplementedError(f'needs cuDNN: {error}') from error
    if version < PACKED_CUDNN and not tokens.plain:
        raise NotImplementedError(f'needs cuDNN {PACKED_CUDNN} for packed rows, not {version}.')

    q = rotate(q, tokens.positions, setting.frequencies, setting.query_scale).astype(q.dtype)
    k = rotate(k, tokens.positions, setting.frequencies).astype(k.dtype)
    if tokens.plain:
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=setting.logit_scale,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation='cudnn',
        )
        return out[:, :T]
    ids, scale = tokens.ids_of_keys, setting.logit_scale
    run = packed_few if setting.few_documents else packed
    out = run(q, k, v, ids, scale, window)
    out = jnp.where((tokens.ids_of_queries != 0)[:, :, None, None], out, 0)
    return out[:, :T]


def packed_few(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'],
    scale: float,
    window: int,
) -> Float[Array, 'B T N H']:
    """Computes `packed` in one call, where no row has more than CUDNN_SEGMENTS runs; else NaN.

    A call that depends on the data makes the host wait for the GPU, and then the GPU for the host:
    34 of a step's 442 ms (helios_1b, H200). Padding, whose results hold anything, goes with the run
    before it, so that every row is written and nothing needs to be masked.
    """
    starts_run = (segment_ids != before(segment_ids)) & (segment_ids != 0)
    runs = jnp.maximum(jnp.cumsum(starts_run, axis=1) - 1, 0)
    out = call_cudnn(*grouped(q, k, v), runs, scale=scale, window=window)
    return jnp.where(jnp.max(runs) < CUDNN_SEGMENTS, out, jnp.nan)


def packed(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'],
    scale: float,
    window: int,
) -> Float[Array, 'B T N H']:
    """Computes causal attention within runs of equal segment id, zeros where the id is 0.

    A row of at most CUDNN_SEGMENTS runs takes one call; where a row has more, all take as many
    calls as the longest list needs.
    """
    T = q.shape[1]
    q, k, v = grouped(q, k, v)
    runs = run_index(segment_ids)
    call = functools.partial(call_cudnn, scale=scale, window=window)
    if T <= CUDNN_SEGMENTS:
        return some(call, q, k, v, runs)
    # Masking padding out here, not in the branch, lets it fuse with the rotation.
    live = (runs >= 0)[:, :, None, None]
    q, k, v = (jnp.where(live, x, 0) for x in (q, k, v))
    several = functools.partial(in_turns, call)
    out = jax.lax.cond(jnp.max(runs) < CUDNN_SEGMENTS, call, several, q, k, v, runs)
    return jnp.where(live, out, 0)


def grouped(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Returns q, k and v with the keys' heads repeated, where cuDNN's function needs that."""
    N, K = q.shape[2], k.shape[2]
    if N != K and jax.__version_info__ < GROUPED_PACKING:
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    return q, k, v


def some(call: Call, q: Array, k: Array, v: Array, runs: Array) -> Array:
    """Computes attention within runs 0 … CUDNN_SEGMENTS−1, zeros elsewhere."""
    # Masked on the way in too: what the kernel leaves unwritten in dq, dk and dv becomes zero.
    live = ((runs >= 0) & (runs < CUDNN_SEGMENTS))[:, :, None, None]
    q, k, v = (jnp.where(live, x, 0) for x in (q, k, v))
    return jnp.where(live, call(q, k, v, runs), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_turns(call: Call, q: Array, k: Array, v: Array, runs: Array) -> Array:
    """Computes attention within all runs, CUDNN_SEGMENTS of each row at a time.

    Only the arguments are saved for backward: a result of every call would be an array as
    large as the whole result for every CUDNN_SEGMENTS tokens.
    """
    # A token is in one call alone, so that the sums are exact.
    add = lambda i, total: total + some(call, q, k, v, runs - i * CUDNN_SEGMENTS)
    return jax.lax.fori_loop(0, num_turns(runs), add, jnp.zeros_like(q))


def _in_turns_forward(call: Call, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return in_turns(call, *arguments), arguments


def _in_turns_backward(call: Call, saved: tuple[Array, ...], d_out: Array) -> tuple[Any, ...]:
    *arguments, runs = saved

    def add(i: Array, totals: list[Array]) -> list[Array]:
        own = runs - i * CUDNN_SEGMENTS
        _, vjp = jax.vjp(lambda q, k, v: some(call, q, k, v, own), *arguments)
        return [total + one for total, one in zip(totals, vjp(d_out), strict=True)]

    zeros = [jnp.zeros_like(x) for x in arguments]
    return *jax.lax.fori_loop(0, num_turns(runs), add, zeros), None


in_turns.defvjp(_in_turns_forward, _in_turns_backward)


def num_turns(runs: Int[Array, 'B T']) -> Int[Array, '']:
    """Number of calls that the row with the most runs takes."""
    return jnp.max(runs) // CUDNN_SEGMENTS + 1


def run_index(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Numbers the runs of equal non-zero ids of each row 0, 1, …; padding gets −1."""
    live = segment_ids != 0
    starts_run = live & (segment_ids != before(segment_ids))
    return jnp.where(live, jnp.cumsum(starts_run, axis=1) - 1, -1)


def before(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Returns the id of the token before each one; 0 before the first."""
    return jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))


def call_cudnn(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    runs: Int[Array, 'B T'],
    *,
    scale: float,
    window: int,
) -> Float[Array, 'B T N H']:
    """Attends within runs 0 … CUDNN_SEGMENTS−1; other rows of the result may hold anything."""
    starts, lengths = extents(runs, CUDNN_SEGMENTS)
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=window or None,
    )


def extents(runs: Int[Array, 'B T'], M: int) -> tuple[Int[Array, 'B M'], Int[Array, 'B M']]:
    """First indices and lengths of runs 0 … M−1 of each row, in tokens; −1 for absent runs."""
    T = runs.shape[1]
    member: Bool[Array, 'B T M'] = runs[:, :, None] == jnp.arange(M)[None, None]
    at = jnp.arange(T, dtype=jnp.int32)[None, :, None]
    starts = jnp.min(jnp.where(member, at, T), axis=1)
    lengths = jnp.sum(member, axis=1, dtype=jnp.int32)
    return jnp.where(lengths > 0, starts, -1), jnp.where(lengths > 0, lengths, -1)
