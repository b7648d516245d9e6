"""Products of bfloat16 activations with float32 weights, in float32, at the speed of bfloat16.

A float32 number is the sum of three bfloat16 ones, and a matrix unit multiplies bfloat16 numbers
exactly. So three products with the parts of the weights, whose results add up in float32, compute
what a float32 product would: with half the passes of `Precision.HIGHEST`, which splits the
activations as well, and none of them on an NVIDIA GPU outside the matrix units.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from helios_jax.model.layers import precision


def split(x: Float[Array, '...'], num_parts: int) -> list[Float[Array, '...']]:
    """Splits a float32 array into bfloat16 ones, largest first; the sum of three is exact."""
    parts, rest = [], x
    for _ in range(num_parts):
        # No cast to bfloat16 and back: XLA may leave such a pair out.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return parts


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def from_bfloat16(
    x: Float[Array, 'B T D'], w: Float[Array, 'D E'], repeated: bool
) -> Float[Array, 'B T E']:
    """Returns x · w in float32 for bfloat16 x and float32 w.

    The gradient of w is as exact; that of x, which is rounded to bfloat16, has 16 bits before.

    Args:
      repeated: contract over x beside itself, where the compiler reads it three times and stores
        no copy (TPUs); else results of three times the width are added up.
    """
    parts = split(w, 3)
    if repeated:
        return _dot('kbtd,kde->bte', jnp.stack([x, x, x]), jnp.stack(parts))
    return _dot('btd,dke->btke', x, jnp.stack(parts, axis=1)).sum(axis=2)


def _dot(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _backward(
    repeated: bool, saved: tuple[Array, Array], d_out: Float[Array, 'B T E']
) -> tuple[Float[Array, 'B T D'], Float[Array, 'D E']]:
    x, w = saved
    high, middle = split(w, 2)
    parts = split(d_out, 3)
    pairs = jnp.stack([parts[0], parts[0], parts[1]]), jnp.stack([high, middle, high])
    d_x = _dot('kbte,kde->btd', *pairs).astype(x.dtype)
    if repeated:
        return d_x, _dot('kbtd,kbte->de', jnp.stack([x, x, x]), jnp.stack(parts))
    return d_x, _dot('btd,btke->dke', x, jnp.stack(parts, axis=2)).sum(axis=1)


from_bfloat16.defvjp(lambda x, w, repeated: (from_bfloat16(x, w, repeated), (x, w)), _backward)


def exact_product(
    x: Float[Array, 'B T D'], w: Float[Array, 'D E'], platform: str = ''
) -> Float[Array, 'B T E']:
    """Returns x · w with the exactness of float32, for x in bfloat16 or in w's dtype.

    Args:
      platform: compile for another platform than the running one; '' is ours.
    """
    if x.dtype == jnp.bfloat16:
        return from_bfloat16(x, w, (platform or jax.default_backend()) == 'tpu')
    return jnp.einsum('btd,de->bte', x, w, precision=precision(w.dtype))
