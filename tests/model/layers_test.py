"""Embeddings: what a frequent token's row learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.model.layers import lookup

V, B, T, D = 5, 3, 700, 6


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_a_rows_gradient_is_the_sum_over_all_its_occurrences(dtype):
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(V, D)), dtype)
    indices = np.where(random.random((B, T)) < 0.9, 3, random.integers(0, V - 1, (B, T)))
    d_out = jnp.asarray(1 + random.normal(size=(B, T, D)), dtype)
    rows, vjp = jax.vjp(lambda table: lookup(V, table, jnp.asarray(indices)), table)
    np.testing.assert_array_equal(rows, np.asarray(table)[indices])
    (gradient,) = vjp(d_out)
    assert gradient.dtype == dtype
    expected = np.zeros((V, D))
    np.add.at(expected, indices, np.asarray(d_out, np.float64))
    # Rounded once: added up in bfloat16 the frequent row would be far too small.
    tolerance = {'bfloat16': 2**-8, 'float32': 2**-18}[dtype]
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=tolerance)
