"""Attention in plain JAX: float32 throughout, every feature, any device.

softmax(c·tanh(scale · qᵀk / c)) v one block of queries at a time, each block recomputed in the
backward pass, so that memory is linear in T. All S keys are scored for every query, also those
above the diagonal: this is the implementation to trust, not the one to train large models with.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int, Num, Shaped

from helios_jax.kernels.attention.arguments import Setting, Tokens
from helios_jax.kernels.attention.rotation import rotate

QUERY_BLOCK = 256  # tokens; the logits of one block are [B N QUERY_BLOCK S]


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    tokens: Tokens,
    setting: Setting,
) -> Float[Array, 'B T N H']:
    """Computes `kernels.attention.attention`, in float64 where q is float64."""
    return checkpoint_name(forward(q, k, v, tokens, setting)[0], 'attention_output')


def forward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    tokens: Tokens,
    setting: Setting,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N T']]:
    """Returns attention, and each query's log-sum-exp of logits, float32: −∞ if it sees nothing.

    The first result is differentiable, the second a constant.
    """
    out, lse = over_blocks(q, k, v, None, tokens, setting)
    return out.astype(q.dtype), lse


def backward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    out: Float[Array, 'B T N H'],
    lse: Float[Array, 'B N T'],
    cotangent: Float[Array, 'B T N H'],
    tokens: Tokens,
    setting: Setting,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """Computes the gradients of q, k and v.

    Args:
      out, lse: the results of `forward` over these keys, or over more that the queries see.
    """
    cotangent = cotangent.astype(lse.dtype)
    delta = jnp.sum(out * cotangent, axis=-1).swapaxes(1, 2)
    # With weights w = exp(l − lse), Σ w v · cotangent − Σ w · delta has the softmax's gradient.
    _, gradients = jax.vjp(lambda q, k, v: over_blocks(q, k, v, lse, tokens, setting), q, k, v)
    return gradients((cotangent, -delta))


def over_blocks(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    lse: Float[Array, 'B N T'] | None,
    tokens: Tokens,
    setting: Setting,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N T']]:
    """Runs `softmax_block`, or `weigh_block` by a given lse, one block of queries at a time."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grouped = (B, K, N // K, -1)
    positions, key_positions = tokens.positions, tokens.positions_of_keys
    segment_ids, key_segment_ids = None, None
    if not tokens.plain:
        segment_ids, key_segment_ids = tokens.ids_of_queries, tokens.ids_of_keys

    queries = rotate(q, positions, setting.frequencies, setting.query_scale * setting.logit_scale)
    queries = queries.swapaxes(1, 2).reshape(*grouped, H)
    keys = rotate(k, key_positions, setting.frequencies).transpose(0, 2, 1, 3)
    values = v.astype(keys.dtype).transpose(0, 2, 1, 3)
    tops = None if lse is None else lse.reshape(grouped)

    def attend(num_keys: int, queries: Array, tops: Any, at: Array, ids: Any) -> Any:
        mask = visible(at, key_positions, ids, key_segment_ids, setting.window)[:, :, :num_keys]
        logits = score_block(queries, keys[:, :, :num_keys], mask, setting.softcap)
        if tops is None:
            return softmax_block(logits, values[:, :, :num_keys])
        return weigh_block(logits, values[:, :, :num_keys], tops)

    def attend_if_live(queries: Array, tops: Any, at: Array, ids: Any) -> Any:
        some, none = (functools.partial(attend, num_keys) for num_keys in (S, 0))
        if not tokens.queries_masked:
            return some(queries, tops, at, ids)
        return jax.lax.cond(jnp.any(ids != 0), some, none, queries, tops, at, ids)

    if T <= QUERY_BLOCK:
        out, sums = attend_if_live(queries, tops, positions, segment_ids)
    else:
        arrays = ((queries, 3), (tops, 3), (positions, 1), (segment_ids, 1))
        blocks = [None if x is None else blocks_of(x, axis) for x, axis in arrays]
        body = jax.checkpoint(attend_if_live, prevent_cse=False)
        results = jax.lax.map(lambda block: body(*block), blocks)
        join = lambda x: jnp.moveaxis(x, 0, 3).reshape(*grouped, *x.shape[5:])[:, :, :, :T]
        out, sums = map(join, results)
    return out.reshape(B, N, T, H).swapaxes(1, 2), sums.reshape(B, N, T)


def blocks_of(x: Shaped[Array, '...'], axis: int) -> Shaped[Array, '...']:
    """Cuts [… T …] into [blocks … QUERY_BLOCK …], the last block padded with zeros."""
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
    """Mask of the keys that each query sees."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0
    if window:
        mask &= distance < window
    if segment_ids is not None and key_segment_ids is not None:
        mask &= segment_ids[:, :, None] == key_segment_ids[:, None, :]
        mask &= (segment_ids != 0)[:, :, None]
    return mask


def score_block(
    queries: Float[Array, 'B K G T H'],
    keys: Float[Array, 'B K S H'],
    mask: Bool[Array, 'B T S'],
    softcap: float,
) -> Float[Array, 'B K G T S']:
    """Computes the logits of scaled, rotated queries; −∞ where the mask is False."""
    B, K, G, T, H = queries.shape
    # The G queries of a key head share its matmul: one of G·T rows, not G of T.
    queries = queries.reshape(B, K, G * T, H)
    logits = jnp.einsum('bkth,bksh->bkts', queries, keys, precision=jax.lax.Precision.HIGHEST)
    logits = logits.reshape(B, K, G, T, keys.shape[2])
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.where(mask[:, None, None], logits, -jnp.inf)


def softmax_block(
    logits: Float[Array, 'B K G T S'], values: Float[Array, 'B K S H']
) -> tuple[Float[Array, 'B K G T H'], Float[Array, 'B K G T']]:
    """Returns softmax(logits) values and the log-sum-exp, a constant; 0 and −∞ if all is masked."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    out, total = weigh_block(logits, values, top)
    total = jnp.where(total == 0, 1, total)
    return out / total[..., None], top + jnp.log(jax.lax.stop_gradient(total))


def weigh_block(
    logits: Float[Array, 'B K G T S'],
    values: Float[Array, 'B K S H'],
    tops: Float[Array, 'B K G T'],
) -> tuple[Float[Array, 'B K G T H'], Float[Array, 'B K G T']]:
    """Returns Σ exp(logits − tops) values and Σ exp(logits − tops)."""
    B, K, G, T, S = logits.shape
    # A row without a visible key has top = −∞, and −∞ − −∞ is NaN.
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(tops), tops, 0)[..., None])
    rows = weights.reshape(B, K, G * T, S)
    out = jnp.einsum('bkts,bksh->bkth', rows, values, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(B, K, G, T, values.shape[3]), jnp.sum(weights, axis=-1)
