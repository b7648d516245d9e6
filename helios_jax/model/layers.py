"""Basic layers of the model. Every matmul weight is an `Einsum`."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from helios_jax.arch.rules import Axes
from helios_jax.arch.weights import NORM, Weight


def partitioned(init: Any, axes: Axes) -> Any:
    """Wraps `init`, so that its value carries logical axes; a module reads it without them."""
    return nn.with_logical_partitioning(init, axes)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Matmul precision of a dtype: float32 is exact, where the default would round operands."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def float32_or_wider(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Einsum(nn.Module):
    """One weight (arch/weights.py) and the product with it.

    The parameter is float32, the product takes `dtype`.

    The cast happens where the weight is used: its gradient then crosses the network in `dtype`,
    half the bytes of float32 in bfloat16.
    """

    row: Weight
    dtype: DTypeLike
    zeros: bool = False

    def setup(self) -> None:
        init: Any = nn.initializers.normal(self.row.gain * self.row.fan_in**-0.5)
        if self.zeros:
            init = nn.initializers.zeros
        self.w = self.param('w', partitioned(init, self.row.axes), self.row.shape, jnp.float32)

    def __call__(self, equation: str, x: Array) -> Array:
        weight = self.weight()
        return jnp.einsum(equation, x.astype(self.dtype), weight, precision=precision(self.dtype))

    def weight(self) -> Array:
        """Returns the weight in the compute dtype, for products that are not one einsum."""
        return self.w.astype(self.dtype)


def normalize(x: Float[Array, '*B D'], eps: Any) -> Float[Array, '*B D']:
    """Returns x / √(mean x² + eps) over the last axis, in float32 (RMSNorm, 1910.07467)."""
    x = float32_or_wider(x)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """RMS normalisation with a learnt scale, in float32; returns x.dtype.

    `eps` comes with the call because it follows the stream's scale (see gmu.py).
    """

    def __call__(self, x: Float[Array, '*B D'], eps: Any) -> Float[Array, '*B D']:
        return scaled(x, self.scale(x.shape[-1]), eps)

    @nn.compact
    def scale(self, dim: int) -> Float[Array, 'D']:
        init = partitioned(nn.initializers.ones, NORM)
        return self.param('scale', init, (dim,), jnp.float32)


def scaled(x: Float[Array, '*B D'], scale: Float[Array, 'D'], eps: Any) -> Float[Array, '*B D']:
    """Multiplies `normalize` with the scale; returns x.dtype."""
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return (normalize(x, eps) * scale).astype(x.dtype)


class Embed(nn.Module):
    """Token embeddings, N(0, 1), kept in float32 and read in `dtype`."""

    row: Weight
    dtype: DTypeLike

    def setup(self) -> None:
        init = partitioned(nn.initializers.normal(1.0), self.row.axes)
        self.w = self.param('w', init, self.row.shape, jnp.float32)

    def __call__(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        return lookup(self.row.shape[0], self.w.astype(self.dtype), tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def lookup(
    number: int, table: Float[Array, 'V D'], indices: Int[Array, 'B T']
) -> Float[Array, 'B T D']:
    """Looks up the table's rows at these indices; `number` is V.

    A row's gradient, the sum over its every occurrence, adds up in float32: in bfloat16 the terms
    of a frequent token would soon be too small to change it.
    """
    return jnp.take(table, indices, axis=0)


def _lookup_forward(number: int, table: Array, indices: Array) -> tuple[Array, Array]:
    return lookup(number, table, indices), indices


def _lookup_backward(number: int, indices: Array, d_out: Array) -> tuple[Array, None]:
    wide = float32_or_wider(d_out)
    total = jnp.zeros((number, d_out.shape[-1]), wide.dtype).at[indices].add(wide)
    return total.astype(d_out.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
