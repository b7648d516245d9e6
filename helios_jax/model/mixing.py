"""Arithmetic of a Gated Memory Unit: the gate, and the mix of the stream with an update.

    g = σ(W_b hidden + b)        y = λ x + g ⊙ (û − x) + α x₀

model/gmu.py has the module, and says what the letters mean.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from helios_jax import config
from helios_jax.model.layers import float32_or_wider, normalize, precision, scaled

INTERPOLATING = ('convex', 'highway')  # y = x + g ⊙ (û − x); else y = x + g ⊙ û


class Weights(NamedTuple):
    """Weights of a GMU; None where its kind lacks one. Matrices are in the compute dtype."""

    from_input: Float[Array, 'D W'] | None = None
    from_output: Float[Array, 'D W'] | None = None
    out: Float[Array, 'W D'] | None = None  # W_b of a low-rank gate
    vector: Float[Array, '1 1 V'] | None = None  # the bias, or the factor that replaces the gate
    scale: Float[Array, 'D'] | None = None  # scale of the output norm
    embedding: Float[Array, '1 1 1'] | None = None  # α
    stream: Float[Array, '1 1 1'] | None = None  # λ


class Gate(NamedTuple):
    """Inputs of a gate; None where a kind of gate lacks one."""

    hidden: Float[Array, 'B T W'] | None = None  # hidden vector of each token
    out: Float[Array, 'W D'] | None = None  # W_b, which multiplies a low-rank gate's hidden
    vector: Float[Array, '1 1 V'] | None = None

    def opened(self, kind: str, dim: int) -> Array:
        """Returns g in [0, 1], or the factor in its place: float32, broadcastable to [B, T, D]."""
        if self.vector is None:
            return jnp.ones((1, 1, 1), jnp.float32)
        if kind in ('layerscale', 'rezero'):
            return self.vector
        logits = self.hidden
        if logits is not None and self.out is not None:
            dtype = self.out.dtype
            logits = jnp.einsum('btw,wd->btd', logits, self.out, precision=precision(dtype))
        bias = self.vector
        gate = jax.nn.sigmoid(bias if logits is None else float32_or_wider(logits) + bias)
        # one gate serves a run of D / width neighbouring channels
        width = gate.shape[-1]
        return jnp.repeat(gate, dim // width, axis=-1) if 1 < width < dim else gate


def mix(
    gmu: config.GMU,
    eps: float,
    name: str,
    again: bool,
    weights: Weights,
    x: Float[Array, 'B T D'],
    x_hat: Float[Array, 'B T D'],
    update: Float[Array, 'B T D'],
    x_0: Float[Array, 'B T D'] | None = None,
) -> Float[Array, 'B T D']:
    """Mixes a sublayer's output into the stream x through a gate.

    Args:
      x_0: what the embedding gave; None where the unit does not add it.
      name: name of the tensor that the gate is computed from, for the memory system.
      again: True: the backward pass recomputes the mix from its inputs. False: its float32
        intermediates are saved.
    """
    # The gradient of the update's product with W_u reads the update too, no normalised copy of it.
    product = recomputed(partial(normalized_product, eps), again)
    gate = gate_of(product, name, weights, x_hat, update)
    function = recomputed(partial(join, gmu, eps), again)
    return function(x, update, gate, weights.scale, weights.stream, weights.embedding, x_0)


def recomputed(function: Callable[..., Array], again: bool) -> Callable[..., Array]:
    """Returns a function whose backward pass computes it again, if it is to."""
    return jax.checkpoint(function) if again else function


def gate_of(
    product: Callable[[Array, Array], Array],
    name: str,
    weights: Weights,
    x_hat: Float[Array, 'B T D'],
    update: Float[Array, 'B T D'],
) -> Gate:
    """Computes a gate's inputs; `product` is `normalized_product` with its eps."""
    terms = []
    if weights.from_input is not None:
        dot = partial(jnp.einsum, precision=precision(weights.from_input.dtype))
        terms.append(dot('btd,dr->btr', x_hat, weights.from_input))
    if weights.from_output is not None:
        terms.append(product(update, weights.from_output))
    hidden = checkpoint_name(sum(terms[1:], terms[0]), name) if terms else None
    return Gate(hidden, weights.out, weights.vector)


def join(
    gmu: config.GMU,
    eps: float,
    x: Float[Array, 'B T D'],
    update: Float[Array, 'B T D'],
    gate: Gate,
    scale: Float[Array, 'D'] | None,
    stream: Float[Array, '1 1 1'] | None = None,
    embedding: Float[Array, '1 1 1'] | None = None,
    x_0: Float[Array, 'B T D'] | None = None,
) -> Float[Array, 'B T D']:
    """Mixes a sublayer's output into the stream x in float32; returns x.dtype.

    Args:
      scale: scale of the output norm; None without one.
      stream: λ, by which x is multiplied; None: it is not.
      embedding: α, by which x₀ is multiplied and added; None: it is not.
    """
    if scale is not None:
        update = scaled(update, scale, eps)
    wide, update = float32_or_wider(x), float32_or_wider(update)
    opened = gate.opened(gmu.kind, x.shape[-1])
    if gmu.kind in INTERPOLATING:
        update = update - wide
    if stream is not None:
        wide = stream * wide
    wide = wide + opened * update
    if embedding is not None and x_0 is not None:
        wide = wide + embedding * float32_or_wider(x_0)
    return wide.astype(x.dtype)


def normalized_product(
    eps: float, update: Float[Array, 'B T D'], weight: Float[Array, 'D W']
) -> Float[Array, 'B T W']:
    """Multiplies ū with a weight, in the weight's dtype."""
    normalized = normalize(update, eps).astype(weight.dtype)
    return jnp.einsum('btd,dw->btw', normalized, weight, precision=precision(weight.dtype))
