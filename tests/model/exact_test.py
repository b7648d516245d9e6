"""Products with float32 weights: as exact as float32, forward and both gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.model.exact import exact_product, split

B, T, D, E = 2, 37, 301, 13


def draw(seed, *shape):
    """Numbers whose magnitudes spread, so that every bit of a float32 counts."""
    random = np.random.default_rng(seed)
    return random.normal(size=shape) * np.exp2(random.integers(-6, 7, shape))


def as_float64(x):
    return np.asarray(x, np.float64)


def test_three_parts_add_up_to_every_bit():
    x = jnp.asarray(draw(0, 5_000), jnp.float32)
    parts = jax.jit(split, static_argnums=1)(x, 3)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    np.testing.assert_array_equal(sum(map(as_float64, parts)), as_float64(x))


@pytest.mark.parametrize(
    ('dtype', 'platform'), [('bfloat16', 'tpu'), ('bfloat16', 'gpu'), ('float32', '')]
)
def test_product_and_gradients_are_those_of_float64(dtype, platform):
    x = jnp.asarray(draw(1, B, T, D), dtype)
    w, d_out = jnp.asarray(draw(2, D, E), jnp.float32), jnp.asarray(draw(3, B, T, E), jnp.float32)
    out, pull = jax.vjp(jax.jit(partial(exact_product, platform=platform)), x, w)
    d_x, d_w = pull(d_out)
    assert (out.dtype, d_x.dtype, d_w.dtype) == (jnp.float32, x.dtype, jnp.float32)
    wide = [as_float64(each) for each in (x, w, d_out)]
    sixteen_bits = 2.0**-16 if dtype == 'bfloat16' else 0
    for equation, found, left, right, parts, rounding in (
        ('btd,de->bte', out, wide[0], wide[1], 0, 0),
        ('bte,de->btd', d_x, wide[2], wide[1], sixteen_bits, 256 * sixteen_bits),
        ('btd,bte->de', d_w, wide[0], wide[2], 0, 0),
    ):
        expected = np.einsum(equation, left, right)
        terms = np.einsum(equation, abs(left), abs(right))  # what rounding is relative to
        # Sums of float32 round each of D terms; a lost part would be 2⁻⁸ or 2⁻¹⁶ of them.
        bound = (2.0**-20 + parts) * terms + rounding * abs(expected)
        assert (abs(as_float64(found) - expected) <= bound).all(), equation
