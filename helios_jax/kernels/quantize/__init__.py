"""Stores rows in one byte a value: a payload, and one power-of-two scale for each row.

A product with a power of two is exact, so that all of the error is the payload's rounding: a
relative 2⁻⁴ in FP8 (e4m3, three bits of mantissa), 1/127 of the row's largest in int8.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

FORMATS = ('fp8', 'int8')
LARGEST = {'fp8': 448, 'int8': 127}  # largest value of a payload
DTYPES = {'fp8': jnp.float8_e4m3fn, 'int8': jnp.int8}
LOST = -128  # the exponent of a row with a NaN or an infinity: it comes back as NaN
BIAS = 127  # bias of float32's exponent, which lies above the bits of the mantissa
MANTISSA_BITS = np.int32(23)  # int32 even where JAX takes integers for int64
MANTISSA = (1 << 23) - 1


class Stored(NamedTuple):
    """Stored rows of H values. FP8 is kept as bits: `jax.checkpoint` would round float8 to NaN."""

    payload: Any  # uint8 or int8 [... H]
    exponents: Any  # int8 [...]

    @property
    def values(self) -> Array:
        """Payload in the format's own dtype: float8_e4m3fn or int8."""
        fp8 = self.payload.dtype == jnp.uint8
        return jax.lax.bitcast_convert_type(self.payload, DTYPES['fp8']) if fp8 else self.payload


def store(x: Float[Array, '... H'], form: str) -> Stored:
    """Stores rows along the last axis, each with the least scale that holds its largest value.

    Raises:
      ValueError: `form` is not one of `FORMATS`.
    """
    if form not in FORMATS:
        raise ValueError(f'form={form!r}: must be one of {FORMATS}.')
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return pack(encode(x, largest, form), exponents_for(largest[..., 0], form))


def pack(values: Array, exponents: Array) -> Stored:
    """Stores values that are in the format's own dtype."""
    if values.dtype == DTYPES['fp8']:
        values = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return Stored(values, exponents)


def scale_bits(largest: Array, form: str) -> Array:
    """Float32 bits of the least power of two, 2⁻¹²⁶ or more, that scales a row enough."""
    quotient = jax.lax.bitcast_convert_type(largest * (1 / LARGEST[form]), jnp.int32)
    return jnp.maximum((quotient + MANTISSA) & ~MANTISSA, 1 << 23)


def exponents_for(largest: Array, form: str) -> Array:
    """Computes the int8 exponents of rows from their largest magnitudes, in float32."""
    exponents = jax.lax.shift_right_logical(scale_bits(largest, form), MANTISSA_BITS) - BIAS
    return jnp.where(largest < jnp.inf, exponents, LOST).astype(jnp.int8)  # NaN is no less


def encode(x: Array, largest: Array, form: str) -> Array:
    """Casts float32 rows to the format's dtype; a row that is `LOST` may become anything.

    Written for kernels: few operations on each value, none of them slow.
    """
    inverse = jax.lax.bitcast_convert_type(
        (2 * BIAS << 23) - scale_bits(largest, form), jnp.float32
    )
    scaled = x * inverse
    return (jnp.round(scaled) if form == 'int8' else scaled).astype(DTYPES[form])


def dequantize(stored: Stored, dtype: DTypeLike) -> Float[Array, '... H']:
    """Decodes stored rows: the values that `store` was given, rounded to its format."""
    scales = power_of_two(stored.exponents.astype(jnp.int32))[..., None]
    return (stored.values.astype(jnp.float32) * scales).astype(dtype)


def power_of_two(exponents: Array) -> Array:
    """Computes 2^int32 in float32, NaN for `LOST`; exact, by bits alone, for use in kernels."""
    nan = jnp.int32(0x7FC00000)
    bits = jnp.where(exponents == LOST, nan, jax.lax.shift_left(exponents + BIAS, MANTISSA_BITS))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
