"""Attention in NumPy: the oracle in float64, the plain computation in a narrower dtype.

The gradients are written out by hand, so that it shares nothing with what it judges.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from helios_jax.kernels.attention import Setting, Tokens


class Results(NamedTuple):
    out: Float[np.ndarray, 'B T N H']
    dq: Float[np.ndarray, 'B T N H']
    dk: Float[np.ndarray, 'B S K H']
    dv: Float[np.ndarray, 'B S K H']
    lse: Float[np.ndarray, 'B N T']  # natural logarithm; −inf where a query sees nothing


def oracle(
    q: Float[np.ndarray, 'B T N H'],
    k: Float[np.ndarray, 'B S K H'],
    v: Float[np.ndarray, 'B S K H'],
    cotangent: Float[np.ndarray, 'B T N H'],
    tokens: Tokens,
    setting: Setting,
    *,
    operand: str = '',
) -> Results:
    """Computes output, gradients and log-sum-exp, of `kernels.attention.attention`'s arguments.

    Args:
      operand: '' computes in float64. A dtype gives the plain computation in it: operands of the
        matmuls and results rounded to it, all else in float32.
    """
    work = np.float32 if operand else np.float64
    rounded = functools.partial(rounded_to, operand=operand)
    positions, segment_ids, key_positions, key_segment_ids = tokens
    frequencies, query_scale, scale, window, softcap, *_ = setting
    key_positions = positions if key_positions is None else key_positions
    mask = visible(positions, key_positions, segment_ids, key_segment_ids, window)
    scale = float(query_scale) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    G = q.shape[2] // k.shape[2]
    queries = rounded(_turn(q.astype(work), positions, frequencies) * work(scale))
    keys = rounded(_turn(k.astype(work), key_positions, frequencies))
    values, cotangent = v.astype(work), cotangent.astype(work)
    out, dq = np.zeros_like(queries), np.zeros_like(queries)
    dk, dv = np.zeros_like(keys), np.zeros_like(values)
    lse = np.zeros((q.shape[0], q.shape[2], q.shape[1]), work)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):  # a head at a time: T·S of them is much memory
        query, key = (b, slice(None), n), (b, slice(None), n // G)
        head = _head(
            queries[query], keys[key], values[key], cotangent[query], mask[b], softcap, rounded
        )
        out[query], dq[query], lse[b, n] = head[0], head[1] * work(scale), head[4]
        dk[key] += head[2]
        dv[key] += head[3]
    dq = _turn(dq, positions, -frequencies)
    dk = _turn(dk, key_positions, -frequencies)
    return Results(rounded(out), rounded(dq), rounded(dk), rounded(dv), lse)


def _head(
    queries: Float[np.ndarray, 'T H'],
    keys: Float[np.ndarray, 'S H'],
    values: Float[np.ndarray, 'S H'],
    cotangent: Float[np.ndarray, 'T H'],
    mask: Bool[np.ndarray, 'T S'],
    softcap: float,
    rounded: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, ...]:
    """Computes out, dq, dk, dv and lse of one head, whose q and k are rotated and scaled."""
    logits = queries @ keys.T
    slope = np.ones_like(logits)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    logits = np.where(mask, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    top[top == -np.inf] = 0
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide='ignore'):
        lse = (np.log(total) + top)[:, 0]
    weights /= np.where(total == 0, 1, total)
    narrow = rounded(weights)
    out = narrow @ values
    # Two sums that cancel where a query sees one key; the plain one too must leave a rest of them.
    change = cotangent @ values.T - (out * cotangent).sum(-1, keepdims=True)
    dlogits = rounded(weights * change * slope)
    return out, dlogits @ keys, dlogits.T @ queries, narrow.T @ cotangent, lse


def rounded_to(x: np.ndarray, operand: str) -> np.ndarray:
    return x.astype(jnp.dtype(operand)).astype(x.dtype) if operand else x


def _turn(
    x: Float[np.ndarray, 'B T N H'],
    positions: Num[np.ndarray, 'B T'],
    frequencies: Float[np.ndarray, 'R'],
) -> Float[np.ndarray, 'B T N H']:
    """Rotates each token by its position: R_t x, in x's dtype."""
    angles = (positions[..., None].astype(x.dtype) * frequencies.astype(x.dtype))[:, :, None]
    low, high = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def visible(
    positions: Num[np.ndarray, 'B T'],
    key_positions: Num[np.ndarray, 'B S'],
    segment_ids: Int[np.ndarray, 'B T'] | None,
    key_segment_ids: Int[np.ndarray, 'B S'] | None,
    window: int,
) -> Bool[np.ndarray, 'B T S']:
    """Tells which keys each query sees."""
    distance = positions[:, :, None] - key_positions[:, None]
    mask = (distance >= 0) & ((distance < window) if window else True)
    if segment_ids is None and key_segment_ids is None:
        return mask
    segment_ids = np.ones_like(positions, int) if segment_ids is None else segment_ids
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    mask &= segment_ids[:, :, None] == key_segment_ids[:, None]
    return mask & (segment_ids != 0)[..., None]
