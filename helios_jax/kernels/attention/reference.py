"""Attention in plain JAX: float32 throughout, every feature, any device.

softmax(c·tanh(scale · qᵀk / c)) v one block of queries at a time, each block recomputed in the
backward pass, so that memory is linear in T. All S keys are scored for every query, also those
above the diagonal: this is the implementation to trust, not the one to train large models with.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Num, Shaped

from helios_jax.kernels.attention.rotation import rotate

QUERY_BLOCK = 256  # tokens; the logits of one block are [B N QUERY_BLOCK S]


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
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
) -> Float[Array, 'B T N H']:
    """As `kernels.attention.attention`; computes in float64 where q is float64."""
    B, T, N, H = q.shape
    K = k.shape[2]
    key_positions = positions if key_positions is None else key_positions
    # Only a caller that gives the keys ids of their own masks queries out by the block.
    skip_dead_blocks = key_segment_ids is not None
    if segment_ids is not None or key_segment_ids is not None:
        segment_ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids

    queries = rotate(q, positions, frequencies, query_scale * scale)
    queries = queries.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    keys = rotate(k, key_positions, frequencies).transpose(0, 2, 1, 3)
    values = v.astype(keys.dtype).transpose(0, 2, 1, 3)

    def attend(queries: Array, at: Array, segments: Array | None) -> Array:
        mask = visible(at, key_positions, segments, key_segment_ids, window)
        return attend_block(queries, keys, values, mask, softcap)

    def attend_if_live(queries: Array, at: Array, segments: Array | None) -> Array:
        if not skip_dead_blocks:
            return attend(queries, at, segments)
        live = jnp.any(segments != 0)
        return jax.lax.cond(live, attend, lambda q, *_: jnp.zeros_like(q), queries, at, segments)

    if T <= QUERY_BLOCK:
        out = attend_if_live(queries, positions, segment_ids)
    else:
        ids = None if segment_ids is None else blocks_of(segment_ids, axis=1)
        blocks = blocks_of(queries, axis=3), blocks_of(positions, axis=1), ids
        body = jax.checkpoint(attend_if_live, prevent_cse=False)
        out = jax.lax.map(lambda block: body(*block), blocks)
        out = jnp.moveaxis(out, 0, 3).reshape(B, K, N // K, -1, H)[:, :, :, :T]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


def blocks_of(x: Shaped[Array, '...'], axis: int) -> Shaped[Array, '...']:
    """[… T …] → [blocks … QUERY_BLOCK …], the last block padded with zeros."""
    blocks = math.ceil(x.shape[axis] / QUERY_BLOCK)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, blocks * QUERY_BLOCK - x.shape[axis])
    shape = (*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)


def visible(
    positions: Num[Array, 'B T'],
    key_positions: Num[Array, 'B S'],
    segment_ids: Int[Array, 'B T'] | None,
    key_segment_ids: Int[Array, 'B S'] | None,
    window: int,
) -> Bool[Array, 'B T S']:
    """Which keys each query sees."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0
    if window:
        mask &= distance < window
    if segment_ids is not None and key_segment_ids is not None:
        mask &= segment_ids[:, :, None] == key_segment_ids[:, None, :]
        mask &= (segment_ids != 0)[:, :, None]
    return mask


def attend_block(
    queries: Float[Array, 'B K G T H'],
    keys: Float[Array, 'B K S H'],
    values: Float[Array, 'B K S H'],
    mask: Bool[Array, 'B T S'],
    softcap: float,
) -> Float[Array, 'B K G T H']:
    """Attention of scaled, rotated queries; one that sees nothing gets zeros, no gradient."""
    B, K, G, T, H = queries.shape
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    # The G queries of a key head share its matmul: one of G·T rows, not G of T.
    logits = einsum('bkth,bksh->bkts', queries.reshape(B, K, G * T, H), keys)
    logits = logits.reshape(B, K, G, T, -1)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # A row without a visible key has top = −inf, and −inf − −inf is NaN.
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = einsum('bkts,bksh->bkth', weights.reshape(B, K, G * T, -1), values)
    return out.reshape(B, K, G, T, H) / jnp.where(total == 0, 1, total)
