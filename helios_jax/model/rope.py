"""Rotary frequencies, and how they are rescaled to read further (2104.09864, 2309.00071).

    θ_i = base^(−2i/H)        θ'_i = (1 − γ_i) θ_i / s + γ_i θ_i        m = 0.1 ln s + 1

γ is 1 where a frequency turns often within the trained length and 0 where it hardly turns once.
YaRN multiplies q and k by m; we leave keys alone and multiply q by m². `linear` divides every θ by
s; `llama3` is YaRN's first ramp with m = 1; `ntk` (dynamic NTK) raises the base instead, as the
position grows. `dynamic` is YaRN whose s grows.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from helios_jax import config


class Tables(NamedTuple):
    """One row a bucket of query positions; bucket c holds positions below L_train · 2^c."""

    frequencies: Float[np.ndarray, 'C R']  # radians per position, R = H/2
    query_scale: Float[np.ndarray, 'C']  # m²


def frequencies(rope: config.Rope, head_dim: int, factor: float) -> Float[np.ndarray, 'R']:
    """Computes θ' [H/2] in float64; returns float32.

    Args:
      factor: s; of `ntk` the position's length in units of L_train.
    """
    half = np.arange(head_dim // 2, dtype=np.float64)
    base = rope.base
    if rope.scaling == 'ntk' and head_dim > 2:  # the only frequency of H = 2 is 1 at any base
        base *= (rope.factor * factor - rope.factor + 1) ** (head_dim / (head_dim - 2))
    theta = base ** (-2 * half / head_dim)
    if factor == 1 or rope.scaling == 'ntk':
        return theta.astype(np.float32)
    if rope.scaling == 'linear':
        return (theta / factor).astype(np.float32)
    if rope.scaling == 'llama3' or rope.ramp == 'linear_in_rotations':
        rotations = rope.trained_length * theta / (2 * np.pi)
        keep = (rotations - rope.beta_slow) / (rope.beta_fast - rope.beta_slow)
    else:
        low = _dimension(rope, head_dim, rope.beta_fast)
        high = _dimension(rope, head_dim, rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        keep = 1 - (half - low) / max(high - low, 0.001)
    keep = np.clip(keep, 0, 1)
    return ((1 - keep) * theta / factor + keep * theta).astype(np.float32)


def _dimension(rope: config.Rope, head_dim: int, rotations: float) -> float:
    """Finds the (fractional) index i at which θ_i makes so many turns over the trained length."""
    turns = rope.trained_length / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.base))


def attention_temperature(rope: config.Rope, factor: float) -> float:
    """Computes YaRN's m for scale factor s; 1 for the other scalings."""
    if rope.scaling not in ('static', 'dynamic'):
        return 1.0
    return rope.attention_factor or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)


def tables(rope: config.Rope, head_dim: int, length: int) -> Tables:
    """Computes frequencies and query scales for positions below `length`.

    Only scalings that grow have more than one bucket: the query at position t uses
    s = 2^⌈log₂ max(1, (t+1)/L_train)⌉ and sees all its keys rotated with it, so that no output
    depends on what comes later.
    """
    factors = [1.0 if rope.scaling == 'none' else rope.factor]
    if rope.grows:
        buckets = math.ceil(math.log2(max(1, length / rope.trained_length)))
        factors = [float(2**c) for c in range(buckets + 1)]
    scale = [attention_temperature(rope, s) ** 2 for s in factors]
    return Tables(
        np.stack([frequencies(rope, head_dim, s) for s in factors]), np.asarray(scale, np.float32)
    )
