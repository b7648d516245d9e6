"""Rows kept in one byte a value: a payload, and one power-of-two scale for each row.

A product with a power of two is exact, so that all of the error is the payload's rounding: a
relative 2⁻⁴ in FP8 (e4m3, three bits of mantissa), 1/127 of the row's largest in int8.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8, UInt8

FORMATS = ('fp8', 'int8')
LARGEST = {'fp8': 448, 'int8': 127}  # of a payload
LOST = -128  # the exponent of a row with a NaN or an infinity: it comes back as NaN
BIAS = 127  # of float32's exponent, which lies above 23 bits of mantissa


class Stored(NamedTuple):
    """Rows of H values. FP8 is kept as its bits: `jax.checkpoint` would round float8 to NaN."""

    payload: UInt8[Array, '... H'] | Int8[Array, '... H']
    exponents: Int8[Array, '...']

    @property
    def values(self) -> Array:
        """The payload in the dtype that it has a meaning in."""
        fp8 = self.payload.dtype == jnp.uint8
        return jax.lax.bitcast_convert_type(self.payload, jnp.float8_e4m3fn) if fp8 else self.payload


def store(x: Float[Array, '... H'], form: str) -> Stored:
    """Rows along the last axis, each with the least scale that holds its largest value.

    Raises:
      ValueError: `form` is not one of `FORMATS`.
    """
    if form not in FORMATS:
        raise ValueError(f'form={form!r}: must be one of {FORMATS}.')
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # Exact: the exponent of the next power of two, from the bits of the quotient.
    bits = jax.lax.bitcast_convert_type(largest / LARGEST[form], jnp.int32)
    exponents = jnp.clip((bits + (1 << 23) - 1 >> 23) - BIAS, 1 - BIAS, BIAS)
    exponents = jnp.where(jnp.isfinite(largest), exponents, LOST)
    scaled = jnp.where(jnp.isfinite(largest), x / power_of_two(exponents), 0)
    if form == 'int8':
        payload = jnp.round(scaled).astype(jnp.int8)
    else:
        payload = jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8)
    return Stored(payload, exponents[..., 0].astype(jnp.int8))


def restore(stored: Stored, dtype: str) -> Float[Array, '... H']:
    """What `store` kept, rounded to its format."""
    scales = power_of_two(stored.exponents.astype(jnp.int32))[..., None]
    return (stored.values.astype(jnp.float32) * scales).astype(dtype)


def power_of_two(exponents: Array) -> Array:
    """2^int32 in float32, NaN for `LOST`; exact, and nothing but bits, for use within kernels."""
    nan = jnp.int32(0x7FC00000)
    bits = jnp.where(exponents == LOST, nan, jax.lax.shift_left(exponents + BIAS, 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
