"""Arguments of attention beside q, k and v: positions of tokens, and settings."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from helios_jax.arch.attention import DTYPES


class Tokens(NamedTuple):
    """Positions and segments of queries and keys: arrays, or their shardings.

    A query sees a key of its own segment that is not later than itself. A missing field has one
    meaning, and the properties are the one place that gives it: an implementation asks them
    and never looks for a None itself.
    """

    positions: Any  # [B T], the queries' in their segments, int32 or float32
    # int32 [B T], the queries' documents; 0 is padding, which sees nothing, and gets zeros and no
    # gradient. None: the rows are one segment, without padding.
    segment_ids: Any = None
    # [B S], the keys' positions. None: the keys are the queries' own tokens (T = S), and positions
    # within a segment rise by one with the index.
    key_positions: Any = None
    # int32 [B S], the keys' documents; 0 is never seen. None: the queries'. Where the keys are the
    # queries' own tokens, the two may differ by zeros alone, which mask queries out.
    key_segment_ids: Any = None

    @property
    def own_keys(self) -> bool:
        """True if the keys are the queries' own tokens; then no query sees a later index."""
        return self.key_positions is None

    @property
    def plain(self) -> bool:
        """True if the rows are causal by index alone; then nobody needs segment ids."""
        return all(x is None for x in self[1:])

    @property
    def queries_masked(self) -> bool:
        """True if keys have ids of their own; these may mask out long stretches of queries."""
        return self.key_segment_ids is not None

    @property
    def positions_of_keys(self) -> Any:
        """Positions of the keys, [B S], int32 or float32."""
        return self.positions if self.key_positions is None else self.key_positions

    @property
    def ids_of_queries(self) -> Any:
        """Segment ids of the queries, int32 [B T]; ones where rows are one segment."""
        return _ones(self.positions) if self.segment_ids is None else self.segment_ids

    @property
    def ids_of_keys(self) -> Any:
        """Segment ids of the keys, int32 [B S]; by default the queries', or ones."""
        if self.key_segment_ids is not None:
            return self.key_segment_ids
        return self.ids_of_queries if self.key_positions is None else _ones(self.key_positions)


class Setting(NamedTuple):
    """Settings of the operation. The two arrays are leaves of the pytree; the rest is static."""

    # [H/2], radians per position by which the channels (i, i + H/2) of q and k are rotated.
    frequencies: Any
    query_scale: Any = 1.0  # scalar, YaRN's m²: multiplies q after its rotation
    scale: float | None = None  # multiplies the logits; None: 1/√H
    window: int = 0  # tokens that a query sees, itself included; 0: all
    softcap: float = 0.0  # c of c·tanh(logits / c), in units of logits; 0: none
    # No row has more than CUDNN_SEGMENTS documents: the caller has counted. Where that is wrong, a
    # GPU's result is NaN.
    few_documents: bool = False

    @property
    def logit_scale(self) -> float:
        """Factor on the logits: `scale`, or 1/√H by default."""
        return 1 / math.sqrt(2 * len(self.frequencies)) if self.scale is None else self.scale


# A NamedTuple would by itself turn its numbers into traced arrays.
jax.tree_util.register_pytree_node(
    Setting, lambda x: (x[:2], x[2:]), lambda static, arrays: Setting(*arrays, *static)
)


def _ones(positions: Any) -> Int[Array, '...']:
    return jnp.ones(positions.shape, jnp.int32)


def check(q: Array, k: Array, v: Array, tokens: Tokens, setting: Setting) -> None:
    """Raises ValueError, naming the argument, for what does not fit together."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f'q {q.shape} must be [B T N H] and k {k.shape} [B S K H].')
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    shapes = {
        'k': (k, (B, S, K, H)),
        'v': (v, (B, S, K, H)),
        'positions': (tokens.positions, (B, T)),
        'segment_ids': (tokens.segment_ids, (B, T)),
        'key_positions': (tokens.key_positions, (B, S)),
        'key_segment_ids': (tokens.key_segment_ids, (B, S)),
        'frequencies': (setting.frequencies, (H // 2,)),
    }
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f'{name} {array.shape} must be of shape {shape}, for q {q.shape}.')
    if jnp.shape(setting.query_scale):
        raise ValueError(f'query_scale {jnp.shape(setting.query_scale)} must be a scalar.')
    if N % K or H % 2:
        raise ValueError(f'k has K={K} heads of H={H}: K must divide N={N}, H must be even.')
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f'q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must be one of {DTYPES}.')
    for name, array in (('positions', tokens.positions), ('key_positions', tokens.key_positions)):
        if array is not None and array.dtype not in ('int32', 'float32'):
            raise ValueError(f'{name} is {array.dtype}: must be int32 or float32.')
    if tokens.own_keys and T != S:
        raise ValueError(f'key_positions must be given where T={T} differs from S={S}.')
    if not tokens.own_keys and tokens.segment_ids is not None and tokens.key_segment_ids is None:
        raise ValueError('key_segment_ids must be given with key_positions and segment_ids.')
    if tokens.segment_ids is None and tokens.key_segment_ids is not None:
        raise ValueError('segment_ids must be given with key_segment_ids.')
    for name, value in (('window', setting.window), ('softcap', setting.softcap)):
        if value < 0:
            raise ValueError(f'{name}={value} must be 0 or more.')
