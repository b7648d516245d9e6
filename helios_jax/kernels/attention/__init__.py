"""Attention: one function, several implementations.

IMPLEMENTATIONS has a row for each: `tpu` (our kernels), `cudnn` (NVIDIA), `reference` (any device,
every feature). An implementation raises NotImplementedError for what it cannot do; `auto` takes
the first of the platform that can.

Implementations tag their residuals with `checkpoint_name`, using config.Actions' names. cuDNN is
one opaque primitive; memory/policy.py's PRIMITIVES names its results.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
from jax import Array
from jaxtyping import Float

from helios_jax.kernels.attention import gpu, reference, tpu
from helios_jax.kernels.attention.arguments import DTYPES, Setting, Tokens, check
from helios_jax.kernels.attention.tpu import blocks
from helios_jax.kernels.quantize import FORMATS

__all__ = ['IMPLEMENTATIONS', 'Blockwise', 'Setting', 'Tokens', 'attention', 'blockwise']

Found = TypeVar('Found')


class Blockwise(NamedTuple):
    """Functions that attend to some of a row's keys at a time; the caller merges the results.

    They do what the functions of the same name do in kernels/attention/reference.py.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


class Implementation(NamedTuple):
    """One way to compute attention, and what it can do."""

    attention: Callable[..., Array]  # (q, k, v, tokens, setting) → out, of one device's arrays
    platform: str = ''  # the only one that it runs on; '': any
    dtypes: tuple[str, ...] = DTYPES  # q's, k's and v's
    head_multiple: int = 2  # H must be a multiple of it
    ready: Callable[[], object] | None = None  # raises NotImplementedError on an unknown machine
    blockwise: Blockwise | None = None
    quantises: bool = False  # takes `residuals`, and can keep q, k and v in a byte a value
    differentiable: bool = True  # has a backward pass

    def check(self, q: Array) -> None:
        """Raises NotImplementedError, saying why, if it cannot take arrays like q here."""
        if q.dtype not in self.dtypes:
            raise NotImplementedError(f'cannot take {q.dtype}: only {", ".join(self.dtypes)}.')
        if q.shape[-1] % self.head_multiple:
            raise NotImplementedError(
                f'cannot take H={q.shape[-1]}: it must be a multiple of {self.head_multiple}.'
            )
        if self.ready:
            self.ready()


# In the order in which `auto` tries those of a platform. config/model.py lists their names.
IMPLEMENTATIONS = {
    'tpu': Implementation(
        tpu.attention,
        platform='tpu',
        dtypes=('bfloat16', 'float32'),
        head_multiple=32,
        ready=blocks.generation,
        blockwise=Blockwise(tpu.forward, tpu.backward),
        quantises=True,
    ),
    'cudnn': Implementation(gpu.attention, platform='gpu', dtypes=('bfloat16', 'float16')),
    'reference': Implementation(
        reference.attention, blockwise=Blockwise(reference.forward, reference.backward)
    ),
}


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    tokens: Tokens,
    setting: Setting,
    *,
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
      tokens: positions and segment ids of queries and keys.
      setting: frequencies of the rotation, scales, window and soft cap.
      residuals: form of q, k and v that backward reads: '' as they are, 'fp8' or 'int8' rounded to
        a byte a value, with a power-of-two scale for each token and head. The result is the
        same; an implementation that does not quantise keeps q, k and v themselves.
      implementation: 'auto', or a name in IMPLEMENTATIONS.
      platform: 'tpu', 'gpu' or 'cpu', where it is compiled for another machine; by default this
        machine's backend.
    Returns:
      In q.dtype.
    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: the implementation that was asked for cannot do this.
    """
    check(q, k, v, tokens, setting)
    if residuals not in ('', *FORMATS):
        raise ValueError(f"residuals={residuals!r}: must be '' or one of {FORMATS}.")

    def run(chosen: Implementation) -> Array:
        kept = {'residuals': residuals} if chosen.quantises else {}
        return chosen.attention(q, k, v, tokens, setting, **kept)

    return first_able(run, q, implementation, platform)


def blockwise(q: Array, implementation: str = 'auto', platform: str | None = None) -> Blockwise:
    """Returns an implementation's functions that attend to some of a row's keys at a time.

    Raises:
      ValueError, NotImplementedError: as `attention`.
    """

    def functions(chosen: Implementation) -> Blockwise:
        if chosen.blockwise is None:
            raise NotImplementedError('cannot attend to some of the keys at a time.')
        return chosen.blockwise

    return first_able(functions, q, implementation, platform)


def first_able(
    use: Callable[[Implementation], Found], q: Array, implementation: str, platform: str | None
) -> Found:
    """Calls `use` with the first implementation that can take q and that `use` does not refuse.

    The choice of 'auto' is logged, as a warning if an accelerator has to take the reference.
    """
    if implementation not in ('auto', *IMPLEMENTATIONS):
        raise ValueError(
            f'implementation={implementation!r}: take auto or {", ".join(IMPLEMENTATIONS)}.'
        )
    platform = platform or jax.default_backend()
    names = [implementation]
    if implementation == 'auto':
        names = [n for n, row in IMPLEMENTATIONS.items() if row.platform in ('', platform)]
    reasons = []
    for name in names:
        chosen = IMPLEMENTATIONS[name]
        try:
            if chosen.platform not in ('', platform):
                raise NotImplementedError(f'needs platform {chosen.platform!r}, not {platform!r}.')
            chosen.check(q)
            found = use(chosen)
        except NotImplementedError as error:
            reasons.append(f'{name} {error}')
            continue
        if implementation == 'auto':
            log_choice(name, platform, tuple(reasons))
        return found
    raise NotImplementedError(f'attention: {" ".join(reasons)}')


@functools.cache
def log_choice(name: str, platform: str, reasons: tuple[str, ...]) -> None:
    """Logs each choice once, however often the model is traced."""
    slow = platform != 'cpu' and not IMPLEMENTATIONS[name].platform
    text = f'attention: {"SLOW " if slow else ""}{name} on {platform}'
    text = ': '.join((text, ' '.join(reasons))) if reasons else f'{text}.'
    logging.getLogger(__name__).log(logging.WARNING if slow else logging.INFO, text)
