"""Attention: one function, several implementations.

Each gives what its backward pass reads the names of `config.Actions`: q, k, v, attention_output and
log_sum_exp, or is one primitive that memory/policy.py knows.

`reference` (any device, every feature), `tpu` (our kernels), `cudnn` (NVIDIA). Each is a module
whose `attention` raises NotImplementedError for what it cannot do; `auto` takes the device's own,
and the reference where that refuses.
"""

import functools
import logging
import math
from typing import Any

import jax
from jax import Array
from jaxtyping import Float, Int, Num

from helios_jax.kernels.attention import gpu, reference, tpu
from helios_jax.kernels.quantize import FORMATS

log = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    'reference': reference.attention,
    'tpu': tpu.attention,
    'cudnn': gpu.attention,
}
BLOCKWISE = {'reference': reference, 'tpu': tpu}
QUANTISES = ('tpu',)  # those that can keep q, k and v in a byte a value for backward
# `auto` takes what is for the platform.
PLATFORMS = {'tpu': 'tpu', 'cudnn': 'gpu'}
DTYPES = ('bfloat16', 'float16', 'float32', 'float64')


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    positions: Num[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    key_positions: Num[Array, 'B S'] | None = None,
    key_segment_ids: Int[Array, 'B S'] | None = None,
    frequencies: Float[Array, 'R'],
    query_scale: float | Float[Array, ''] = 1.0,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    residuals: str = '',
    implementation: str = 'auto',
    platform: str | None = None,
) -> Float[Array, 'B T N H']:
    """Grouped-query attention with rotary positions, causal by position within each segment.

    softmax(c·tanh(scale · (m² R_t q)ᵀ(R_j k) / c)) v over the keys j that the query t sees:
    equal segment, 0 ≤ t − j, and t − j < window if there is one. Logits and softmax in float32.

    Args:
      q: unrotated queries; query head n = k·G + g reads key head k, G = N/K.
      k: unrotated keys.
      v: values.
      positions: of the queries, float32 or int32.
      segment_ids: document of each query; 0 is padding, which attends to nothing and gets zeros and
        no gradient. None: one segment.
      key_positions: of the keys. None: the keys are the queries' own tokens (T = S), and positions
        within a segment rise by one with the index.
      key_segment_ids: document of each key; 0 is never seen. None: `segment_ids`. Where
        `key_positions` is None, `segment_ids` may differ from it only by zeros, which mask queries
        out.
      frequencies: rotation in radians per position of the pairs (i, i + H/2), R = H/2 of them.
      query_scale: YaRN's m², multiplies q in float32 after the rotation.
      scale: multiplies the logits, 1/√H by default.
      window: tokens that a query sees, itself included; 0 is all.
      softcap: c, in units of logits; 0 is none.
      residuals: what backward reads of q, k and v: '' themselves, 'fp8' or 'int8' what is left of
        them in a byte a value, with a power-of-two scale for each token and head. The result is the
        same; only `tpu` can, the others read q, k and v themselves.
      implementation: auto | reference | tpu | cudnn.
      platform: 'tpu', 'gpu' or 'cpu', for `auto` when compiling for another machine; this
        machine's default backend by default.
    Returns:
      In q.dtype.
    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: the implementation that was asked for cannot do this.
    """
    check_arrays(q, k, v, positions, segment_ids, key_positions, key_segment_ids, frequencies)
    for name, value in (('window', window), ('softcap', softcap)):
        if value < 0:
            raise ValueError(f'{name}={value} must be 0 or more.')
    if implementation not in ('auto', *IMPLEMENTATIONS):
        raise ValueError(
            f'implementation={implementation!r}: take auto or {", ".join(IMPLEMENTATIONS)}.'
        )
    if residuals not in ('', *FORMATS):
        raise ValueError(f"residuals={residuals!r}: must be '' or one of {FORMATS}.")
    platform = platform or jax.default_backend()
    arguments = {
        'positions': positions,
        'segment_ids': segment_ids,
        'key_positions': key_positions,
        'key_segment_ids': key_segment_ids,
        'frequencies': frequencies,
        'query_scale': query_scale,
        'scale': 1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        'window': window,
        'softcap': softcap,
        'residuals': residuals,
    }
    if implementation != 'auto':
        return run(implementation, platform, q, k, v, arguments)
    choice = next((name for name, place in PLATFORMS.items() if place == platform), 'reference')
    try:
        out = run(choice, platform, q, k, v, arguments)
        report(logging.INFO, f'attention: {choice} on {platform}.')
    except NotImplementedError as error:
        report(logging.WARNING, f'attention: SLOW reference on {platform}: {choice} {error}')
        out = run('reference', platform, q, k, v, arguments)
    return out


def blockwise(q: Array, implementation: str = 'auto', platform: str | None = None) -> Any:
    """The module whose `forward` and `backward` attend to some of a row's keys at a time.

    Raises:
      NotImplementedError: the implementation that was asked for has no such functions.
    """
    platform = platform or jax.default_backend()
    choice = implementation
    if choice == 'auto':
        choice = 'tpu' if platform == 'tpu' else 'reference'
    if choice not in BLOCKWISE or platform != PLATFORMS.get(choice, platform):
        raise NotImplementedError(f'{choice} on {platform} cannot attend to keys in parts.')
    try:
        BLOCKWISE[choice].check(q)
        slow = choice == 'reference' and platform != 'cpu'
        reason = f'{platform} has no kernel for keys in parts.' if slow else ''
    except NotImplementedError as error:
        if implementation != 'auto':
            raise
        choice, reason = 'reference', f'{choice} {error}'
    if reason:
        report(logging.WARNING, f'attention: SLOW reference on {platform}: {reason}')
    return BLOCKWISE[choice]


def run(
    name: str, platform: str, q: Array, k: Array, v: Array, arguments: dict[str, Any]
) -> Float[Array, 'B T N H']:
    if platform != PLATFORMS.get(name, platform):
        raise NotImplementedError(f'{name} needs platform {PLATFORMS[name]!r}, not {platform!r}.')
    if name not in QUANTISES:
        arguments = {n: value for n, value in arguments.items() if n != 'residuals'}
    return IMPLEMENTATIONS[name](q, k, v, **arguments)


@functools.cache
def report(level: int, message: str) -> None:
    """Logs each message once, however often the model is traced."""
    logging.getLogger(__name__).log(level, message)


def check_arrays(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segment_ids: Array | None,
    key_positions: Array | None,
    key_segment_ids: Array | None,
    frequencies: Array,
) -> None:
    """Raises ValueError, naming the argument, for shapes and dtypes that do not fit together."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f'q {q.shape} must be [B T N H] and k {k.shape} [B S K H].')
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    shapes = {
        'k': (k, (B, S, K, H)),
        'v': (v, (B, S, K, H)),
        'positions': (positions, (B, T)),
        'segment_ids': (segment_ids, (B, T)),
        'key_positions': (key_positions, (B, S)),
        'key_segment_ids': (key_segment_ids, (B, S)),
        'frequencies': (frequencies, (H // 2,)),
    }
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f'{name} {array.shape} must be of shape {shape}, for q {q.shape}.')
    if N % K or H % 2:
        raise ValueError(f'k has K={K} heads of H={H}: K must divide N={N}, H must be even.')
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f'q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must be one of {DTYPES}.')
    for name, array in (('positions', positions), ('key_positions', key_positions)):
        if array is not None and array.dtype not in ('int32', 'float32'):
            raise ValueError(f'{name} is {array.dtype}: must be int32 or float32.')
    if key_positions is None and T != S:
        raise ValueError(f'key_positions must be given where T={T} differs from S={S}.')
    if key_positions is not None and segment_ids is not None and key_segment_ids is None:
        raise ValueError('key_segment_ids must be given with key_positions and segment_ids.')
