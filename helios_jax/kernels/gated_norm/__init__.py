"""The gated mix of a sublayer's output into the stream, and the norm behind it, in one pass.

    û = RMSNorm(u)        y = x + g ⊙ (û − x)        x̂ = RMSNorm(y)

XLA makes several passes over memory of it, and more of its gradient. A kernel reads stream and
update once and writes both results once; backward it reads them and two gradients, and writes two.
It saves nothing but its arguments. On an NVIDIA GPU it is gpu.py, on a TPU tpu.py; elsewhere, and
for what they cannot take, the model's own formulas are XLA's (model/gmu.py).
"""

import functools
import logging
from typing import Any

import jax
from jaxtyping import Array, Float

from helios_jax.kernels.gated_norm import gpu, tpu
from helios_jax.kernels.gated_norm.operands import Mix, MixOperands

__all__ = ['KERNELS', 'Mix', 'MixOperands', 'available', 'gated_norm', 'takes']

KERNELS: dict[str, Any] = {'gpu': gpu, 'tpu': tpu}


def available(platform: str | None = None) -> bool:
    """Tells whether there is a kernel here, or where it is compiled for: 'tpu', 'gpu' or 'cpu'."""
    here = jax.default_backend()
    platform = platform or here
    return platform in KERNELS and (platform != 'gpu' or here == 'gpu')


def takes(given: MixOperands, platform: str | None = None, devices: int = 1) -> bool:
    """Tells whether the platform's kernel takes these; logs why it does not.

    Args:
      devices: number of those that share the tokens.
    """
    platform = platform or jax.default_backend()
    num_tokens = given.x.size // given.x.shape[-1] // devices
    reason = KERNELS[platform].refusal(given, num_tokens)
    if reason:
        log_refusal(platform, reason)
    return not reason


@functools.cache
def log_refusal(platform: str, reason: str) -> None:
    """Logs each reason once, however often the model is traced."""
    logging.getLogger(__name__).info("gated_norm: XLA's passes on %s: %s", platform, reason)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated_norm(
    mix: Mix, platform: str, given: MixOperands
) -> tuple[Float[Array, '*N D'], Float[Array, '*N D'] | None]:
    """Returns the new stream and its normalised form, None without a norm behind.

    All arithmetic is float32.

    Args:
      platform: the one whose kernel `takes` found able.
    """
    return forward_rule(mix, platform, given)[0]


def forward_rule(mix: Mix, platform: str, given: MixOperands) -> tuple[Any, Any]:
    # JAX removes a jitted call that nothing reads, and no kernel: at a layer's end the backward
    # pass needs no result of the forward one.
    made = jax.jit(functools.partial(KERNELS[platform].forward, mix))(given.flat())
    shaped = lambda a: None if a is None else a.reshape(given.x.shape)
    return (shaped(made.stream), shaped(made.normalized)), (given, made.factors)


def backward_rule(mix: Mix, platform: str, saved: Any, gradients: Any) -> tuple[MixOperands]:
    given, factors = saved
    flat = given.flat()
    d_stream, d_normalized = (None if d is None else d.reshape(flat.x.shape) for d in gradients)
    found = KERNELS[platform].backward(mix, flat, factors, d_stream, d_normalized)

    def like(name: str, d: Any) -> Any:
        operand = getattr(given, name)
        return None if d is None else d.reshape(operand.shape).astype(operand.dtype)

    return (MixOperands(**{name: like(name, d) for name, d in found._asdict().items()}),)


gated_norm.defvjp(forward_rule, backward_rule)
