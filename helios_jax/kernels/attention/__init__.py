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

from helios_jax.arch.attention import ROWS, Row, refused
from helios_jax.errors import UserError
from helios_jax.kernels.attention import gpu, reference, tpu
from helios_jax.kernels.attention.arguments import Setting, Tokens, check
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
    """One way to compute attention; its row in arch.attention says what it can do."""

    attention: Callable[..., Array]  # (q, k, v, tokens, setting) → out, of one device's arrays
    row: Row
    ready: Callable[[], object] | None = None  # raises NotImplementedError on an unknown machine
    blockwise: Blockwise | None = None
    differentiable: bool = True  # has a backward pass

    def check(self, q: Array, platform: str, *, softcap: bool, blockwise: bool) -> None:
        """Raises NotImplementedError, saying why, if it cannot take arrays like q, or not here."""
        how = {'softcap': softcap, 'blockwise': blockwise}
        if reason := self.row.refusal(platform, str(q.dtype), q.shape[-1], **how):
            raise NotImplementedError(reason)
        if self.ready:
            self.ready()


class RefusedError(UserError, NotImplementedError):
    """The implementation that was asked for by name cannot do this."""


IMPLEMENTATIONS = {
    'tpu': Implementation(
        tpu.attention,
        ROWS['tpu'],
        ready=blocks.generation,
        blockwise=Blockwise(tpu.forward, tpu.backward),
    ),
    'cudnn': Implementation(gpu.attention, ROWS['cudnn']),
    'reference': Implementation(
        reference.attention,
        ROWS['reference'],
        blockwise=Blockwise(reference.forward, reference.backward),
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
      RefusedError: the implementation that was asked for cannot do this.
    """
    check(q, k, v, tokens, setting)
    if residuals not in ('', *FORMATS):
        raise ValueError(f"residuals={residuals!r}: must be '' or one of {FORMATS}.")

    def run(chosen: Implementation) -> Array:
        kept = {'residuals': residuals} if chosen.row.quantises else {}
        return chosen.attention(q, k, v, tokens, setting, **kept)

    return first_able(run, q, implementation, platform, softcap=setting.softcap > 0)


def blockwise(q: Array, implementation: str = 'auto', platform: str | None = None) -> Blockwise:
    """Returns an implementation's functions that attend to some of a row's keys at a time.

    Raises:
      ValueError, RefusedError: as `attention`.
    """

    def functions(chosen: Implementation) -> Blockwise:
        assert chosen.blockwise, 'its row says that it has none'
        return chosen.blockwise

    return first_able(functions, q, implementation, platform, blockwise=True)


def first_able(
    use: Callable[[Implementation], Found],
    q: Array,
    implementation: str,
    platform: str | None,
    *,
    softcap: bool = False,
    blockwise: bool = False,
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
        names = [n for n, row in ROWS.items() if row.platform in ('', platform)]
    reasons = []
    for name in names:
        chosen = IMPLEMENTATIONS[name]
        try:
            chosen.check(q, platform, softcap=softcap, blockwise=blockwise)
            found = use(chosen)
        except NotImplementedError as error:
            if name == implementation:
                raise RefusedError(refused(name, str(error))) from error
            reasons.append(f'{name} {error}')
            continue
        if implementation == 'auto':
            log_choice(name, platform, tuple(reasons))
        return found
    raise AssertionError(f'the reference can do everything: {" ".join(reasons)}')


@functools.cache
def log_choice(name: str, platform: str, reasons: tuple[str, ...]) -> None:
    """Logs each choice once, however often the model is traced."""
    slow = platform != 'cpu' and not ROWS[name].platform
    text = f'attention: {"SLOW " if slow else ""}{name} on {platform}'
    text = ': '.join((text, ' '.join(reasons))) if reasons else f'{text}.'
    logging.getLogger(__name__).log(logging.WARNING if slow else logging.INFO, text)
