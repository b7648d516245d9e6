"""Turns arrays into the kernels' layout, heads first and tokens in whole blocks, and back."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from helios_jax.kernels.quantize import Stored


def in_chunks(x: Array | Stored, size: int, axis: int = -1) -> Any:
    """Cuts an axis into chunks, which come first; the last is padded with zeros: no segment."""
    if isinstance(x, Stored):
        return Stored(in_chunks(x.payload, size, -2), in_chunks(x.exponents, size))
    x = pad(x, size, axis=axis)
    axis %= x.ndim
    cut = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def pad(x: Array, multiple: int, value: float = 0.0, axis: int = -1) -> Array:
    """Pads an axis to a multiple with `value`."""
    missing = -x.shape[axis] % multiple
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value) if missing else x


def padded(x: Any, multiple: int) -> Any:
    """Pads the tokens of q, k or v to a multiple."""
    if not isinstance(x, Stored):
        return pad(x, multiple, axis=-2)
    return Stored(pad(x.payload, multiple, axis=-2), pad(x.exponents, multiple))


def operands(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return heads_first(q, k.shape[2]), heads_first(k), heads_first(v)


def heads_first(x: Array, K: int = 0) -> Array:
    """Turns [B T N H] into [B K G T H], or, where K is 0, [B T K H] into [B K T H]."""
    B, T, N, H = x.shape
    return jnp.moveaxis(x.reshape(B, T, K, N // K, H) if K else x, 1, -2)


def tokens_first(x: Array, T: int) -> Array:
    """Inverts `heads_first`."""
    x = jnp.moveaxis(x[..., :T, :], -2, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
