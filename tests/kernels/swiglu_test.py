"""SwiGLU of weighted rows: its gradient against float64 and against differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.kernels import swiglu
from helios_jax.kernels.swiglu import gpu

ROUNDED = 2.0**-8  # to bfloat16


def draw(M, F, dtype):
    random = np.random.default_rng(M)
    # Weights of rows that no expert has are zero.
    weight = random.random(M) * (random.random(M) < 0.9)
    wide = jnp.promote_types(dtype, jnp.float32)
    gate_up, d_product = 3 * random.normal(size=(M, 2 * F)), random.normal(size=(M, F))
    return jnp.asarray(gate_up, dtype), jnp.asarray(weight, wide), jnp.asarray(d_product, dtype)


def exact(gate_up, weight, d_product):
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    share, d_out = np.asarray(weight, np.float64)[:, None], np.asarray(d_product, np.float64)
    sigmoid = 1 / (1 + np.exp(-gate))
    d_gate = d_out * share * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_out * share * gate * sigmoid
    value = gate * sigmoid * up
    return np.concatenate([d_gate, d_up], 1), value * share, np.sum(d_out * value, 1)


# Widths that are and are no power of two; rows that fill no program.
@pytest.mark.parametrize(('M', 'F'), [(24, 384), (7, 1024), (1, 128)])
def test_the_kernel_gives_what_float64_does_rounded_once(M, F):
    given = draw(M, F, 'bfloat16')
    assert not gpu.refusal(*given[:2])
    found = gpu.gradient(*given, interpret=True)
    for one, best in zip(found, exact(*given), strict=True):
        one = np.asarray(one, np.float64)
        slack = 2.0**-16 * np.abs(best).max()
        assert (abs(one - best) <= ROUNDED * abs(best) + slack).all()
    assert not np.asarray(found[0])[np.asarray(given[1]) == 0].any()


@pytest.mark.parametrize(
    ('M', 'F', 'dtype'), [(24, 384, 'float32'), (24, 200, 'bfloat16'), (0, 128, 'bfloat16')]
)
def test_what_the_kernel_cannot_take_is_left_to_the_reference(M, F, dtype):
    given = draw(M, F, dtype)
    assert gpu.refusal(*given[:2]).startswith('the kernel takes')
    assert swiglu.gradient(*given, platform='gpu').product.shape == (M, F)


def test_the_reference_is_the_gradient_of_the_product():
    gate_up, weight, d_product = draw(24, 5, 'float32')
    product, pull = jax.vjp(swiglu.multiply, gate_up, weight)
    found = swiglu.gradient(gate_up, weight, d_product)
    for one, best in zip(found, (*pull(d_product)[:1], product, pull(d_product)[1]), strict=True):
        np.testing.assert_allclose(one, best, rtol=1e-5, atol=1e-6)
