"""Products of bfloat16 activations with float32 weights, in float32, at the speed of bfloat16.

A float32 number is the sum of three bfloat16 ones, and a matrix unit multiplies bfloat16 numbers
exactly. So one product with the three parts of the weights side by side, whose results add up in
float32, computes what a float32 product would. A GPU multiplies float32 outside its fast matrix
units. A TPU takes six bfloat16 products for one of float32, and hides them behind the memory that
they read: there this form, whichever way it is written, made a whole step no faster.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from helios_jax.model.layers import float32_or_wider, precision


def split(x: Float[Array, '...'], num_parts: int) -> list[Float[Array, '...']]:
    """Splits a float32 array into bfloat16 ones, largest first; the sum of three is exact."""
    parts, rest = [], x
    for _ in range(num_parts):
        # No cast to bfloat16 and back: XLA may leave such a pair out.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return parts


@jax.custom_vjp
def from_bfloat16(x: Float[Array, 'B T D'], w: Float[Array, 'D E']) -> Float[Array, 'B T E']:
    """Returns x · w in float32 for bfloat16 x and float32 w.

    The gradient of w is as exact; that of x, which is rounded to bfloat16, has 16 bits before.
    """
    return _dot('btd,dke->btke', x, jnp.stack(split(w, 3), axis=1)).sum(axis=2)


def _dot(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _backward(
    saved: tuple[Array, Array], d_out: Float[Array, 'B T E']
) -> tuple[Float[Array, 'B T D'], Float[Array, 'D E']]:
    x, w = saved
    high, middle = split(w, 2)
    parts = split(d_out, 3)
    pairs = jnp.stack([parts[0], parts[0], parts[1]]), jnp.stack([high, middle, high])
    d_x = _dot('kbte,kde->btd', *pairs).astype(x.dtype)
    return d_x, _dot('btd,btke->dke', x, jnp.stack(parts, axis=2)).sum(axis=1)


from_bfloat16.defvjp(lambda x, w: (from_bfloat16(x, w), (x, w)), _backward)


def exact_product(
    x: Float[Array, 'B T D'], w: Float[Array, 'D E'], platform: str = ''
) -> Float[Array, 'B T E']:
    """Returns x · w with the exactness of float32, for x in bfloat16 or in w's dtype.

    Args:
      platform: compile for another platform than the running one; '' is ours.
    """
    if x.dtype == jnp.bfloat16 and (platform or jax.default_backend()) != 'tpu':
        return from_bfloat16(x, w)
    return jnp.einsum('btd,de->bte', float32_or_wider(x), w, precision=precision(w.dtype))
