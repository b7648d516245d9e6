"""SwiGLU of rows with a weight each, silu(gate) · up · weight, and its gradient in one pass.

The pass reads gate and up once for all that the backward pass of a mixture of experts needs of
them: their gradients, the product itself, which the last matrix's gradient contracts, and the
gradient of the weight. XLA makes three passes of it. On an NVIDIA GPU a Triton kernel (gpu.py) is
the pass; elsewhere XLA's fusions are.
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from helios_jax.kernels.swiglu import gpu


class Pass(NamedTuple):
    """Results of one pass over gate and up."""

    d_gate_up: Float[Array, 'M two_F']
    product: Float[Array, 'M F']
    d_weight: Float[Array, 'M']


def multiply(gate_up: Float[Array, 'M two_F'], weight: Float[Array, 'M']) -> Float[Array, 'M F']:
    """Returns silu(gate) · up · weight in gate_up's dtype; computes in weight's, which is wider."""
    gate, up = _halves(gate_up, weight)
    return (jax.nn.silu(gate) * up * weight[:, None]).astype(gate_up.dtype)


def gradient(
    gate_up: Float[Array, 'M two_F'],
    weight: Float[Array, 'M'],
    d_product: Float[Array, 'M F'],
    platform: str | None = None,
) -> Pass:
    """Computes the gradients of `multiply`, and its result once more.

    Args:
      platform: 'tpu', 'gpu' or 'cpu', where it is compiled for another machine.
    """
    here = jax.default_backend()
    if here == 'gpu' == (platform or here):
        reason = gpu.refusal(gate_up, weight)
        if not reason:
            return Pass(*gpu.gradient(gate_up, weight, d_product))
        log_refusal(reason)
    return reference(gate_up, weight, d_product)


@functools.cache
def log_refusal(reason: str) -> None:
    """Logs each reason once, however often the model is traced."""
    logging.getLogger(__name__).info("swiglu: XLA's passes on gpu: %s", reason)


def reference(
    gate_up: Float[Array, 'M two_F'], weight: Float[Array, 'M'], d_product: Float[Array, 'M F']
) -> Pass:
    gate, up = _halves(gate_up, weight)
    d_product, share = d_product.astype(weight.dtype), weight[:, None]
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    d_gate, d_up = d_product * up * slope * share, d_product * silu * share
    return Pass(
        jnp.concatenate([d_gate, d_up], axis=1).astype(gate_up.dtype),
        (silu * up * share).astype(gate_up.dtype),
        jnp.sum(d_product * silu * up, axis=1),
    )


def _halves(gate_up: Array, weight: Array) -> tuple[Array, Array]:
    # Widened once cut: XLA would store the whole in float32.
    gate, up = jnp.split(gate_up, 2, axis=1)
    return gate.astype(weight.dtype), up.astype(weight.dtype)
