"""Rotary position embedding, for the implementations whose kernel does not rotate."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num


def rotate(
    x: Float[Array, 'B T N H'],
    positions: Num[Array, 'B T'],
    frequencies: Float[Array, 'R'],
    scale: float | Float[Array, ''] = 1.0,
) -> Float[Array, 'B T N H']:
    """Computes scale · R_t x, in pairs (i, i + H/2) of channels, as transformers' `rotate_half`.

    Args:
      frequencies: radians per position, R = H/2 of them.
    Returns:
      Float32, or float64 if x is float64: the caller rounds once, after the rotation.
    """
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    angles = positions[:, :, None, None].astype(dtype) * frequencies[None, None, None].astype(dtype)
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    low, high = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
