"""Depth-weighted averages (DenseFormer, 2402.02622): layers read a sum over all earlier outputs.

    Y_i = Σ_{j ≤ i} α_ij X_j          X_{i+1} = layer_{i+1}(Y_i)

X_0 is what the embedding gave, X_j the output of layer j. With `gmu.dwa` = kxp there is an average
behind every p-th layer, elsewhere Y_i = X_i, and it takes every k-th output, the newest among them.
α starts as 1 for the newest output and 0 for the others, so that the network starts as the one
without averages.

Layers carry the sums, not the outputs: each adds its output to every average above it. A sum is
linear, and its gradient in α reads X_j alone, which layer j makes: no layer keeps other layers'
outputs for its backward pass, and what is carried is one array an average, L/p of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.model.layers import float32_or_wider, partitioned
from helios_jax.parallel.sharding import constrain


class Averaged(NamedTuple):
    """Pair that a layer hands to the next one."""

    x: Float[Array, 'B T D']  # what it reads, Y_i
    sums: Float[Array, 'A B T D']  # the averages, each as far as its terms are known


def initial(row: weights.Weight, model: config.Model) -> Any:
    """Returns the initialiser of α: every average is the newest output."""
    newest = [float(j == model.gmu.dwa_period * (a + 1)) for a, j in weights.averaged(model)]
    make = lambda key, shape, dtype: jnp.array(newest, dtype)
    return partitioned(make, row.axes)


def table(model: config.Model, alpha: Float[Array, 'W']) -> Float[Array, 'L1 A']:
    """Arranges α by output and average; what an average does not take has weight 0."""
    numbers, outputs = np.transpose(weights.averaged(model))
    empty = jnp.zeros((model.num_layers + 1, model.num_averages), alpha.dtype)
    return empty.at[outputs, numbers].set(alpha)


def begun(x: Float[Array, 'B T D'], alpha: Float[Array, 'L1 A']) -> Averaged:
    """Starts every average with x, what the embedding gave; the first layer reads x itself."""
    return Averaged(x, added(jnp.zeros((alpha.shape[1], *x.shape), x.dtype), x, alpha[0]))


def joined(
    model: config.Model,
    sums: Float[Array, 'A B T D'],
    x: Float[Array, 'B T D'],
    index: Any,
    alpha: Float[Array, 'L1 A'],
) -> Averaged:
    """Adds x, the output of layer `index` (from 0, may be traced), to the averages above it."""
    number, p = index + 1, model.gmu.dwa_period
    sums = added(sums, x, jax.lax.dynamic_index_in_dim(alpha, number, keepdims=False))
    # Below the first average the number is −1, which the choice behind it leaves out.
    place = jnp.maximum(number // p - 1, 0)
    average = jax.lax.dynamic_index_in_dim(sums, place, keepdims=False)
    return Averaged(jnp.where(number % p == 0, average, x) if p > 1 else average, sums)


def added(
    sums: Float[Array, 'A B T D'], x: Float[Array, 'B T D'], weights: Float[Array, 'A']
) -> Float[Array, 'A B T D']:
    """Adds x times each weight, in float32; returns x.dtype."""
    terms = weights[:, None, None, None] * float32_or_wider(x)[None]
    total = (float32_or_wider(sums) + terms).astype(x.dtype)
    return constrain(total, 'whole', 'batch', 'length', 'stream')
