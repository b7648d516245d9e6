"""Storage in a byte a value, against the definition of its formats."""

import hashlib
import inspect
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.kernels.quantize import LARGEST, LOST, dequantize, store

pytestmark = pytest.mark.usefixtures('quick_compilation')


def rows(dtype='float32'):
    """[5 7 96]: rows of all magnitudes."""
    rng = np.random.default_rng(0)
    scales = 2.0 ** rng.integers(-100, 100, (5, 7, 1))
    return jnp.asarray(rng.standard_normal((5, 7, 96)) * scales, dtype)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize(('form', 'error'), [('fp8', 2**-4), ('int8', 0)])
def test_errors_are_those_of_the_format(form, error, dtype):
    x = rows(dtype)
    stored = store(x, form)
    assert (stored.payload.dtype, stored.exponents.dtype) == (
        jnp.dtype('uint8' if form == 'fp8' else 'int8'), jnp.int8,
    )  # fmt: skip
    assert (stored.payload.shape, stored.exponents.shape) == ((5, 7, 96), (5, 7))
    x, back = np.asarray(x, np.float64), np.asarray(dequantize(stored, 'float32'), np.float64)
    largest = np.abs(x).max(-1, keepdims=True)
    step = 2.0 ** np.asarray(stored.exponents, np.float64)[..., None]
    # The least power of two: half of it could not hold the largest value.
    assert (largest <= LARGEST[form] * step).all()
    assert (largest > LARGEST[form] * step / 2).all()
    least = step * (2**-10 if form == 'fp8' else 0.5)  # half of a subnormal, half of a step
    assert (np.abs(back - x) <= np.maximum(error * np.abs(x), least)).all()


@pytest.mark.parametrize('form', ['fp8', 'int8'])
def test_zeros_stay_and_what_is_not_finite_becomes_nan(form):
    x = rows()
    x = x.at[0, 0].set(0).at[0, 1, 3].set(jnp.nan).at[0, 2, 5].set(-jnp.inf)
    stored = store(x, form)
    back = dequantize(stored, 'bfloat16')
    assert not back[0, 0].any()
    lost = np.zeros((5, 7), bool)
    lost[0, 1:3] = True
    np.testing.assert_array_equal(np.asarray(stored.exponents) == LOST, lost)
    np.testing.assert_array_equal(np.isnan(back), np.broadcast_to(lost[..., None], x.shape))


@pytest.mark.parametrize('form', ['fp8', 'int8'])
def test_the_smallest_and_the_largest_rows_survive(form):
    for magnitude in (2.0**-126, 3e38):
        x = jnp.full((1, 3), magnitude) * jnp.array([[1.0, -1.0, 0.0]])
        np.testing.assert_allclose(dequantize(store(x, form), 'float32'), x, rtol=0.07)


def test_a_policy_that_saves_the_names_does_not_round_them():
    """`jax.checkpoint` reduces the precision of float8 to one that has no such numbers."""
    from jax.ad_checkpoint import checkpoint_name

    def f(x):
        return jnp.sum(jnp.sin(dequantize(checkpoint_name(store(x, 'fp8'), 'kept'), 'float32')))

    policy = jax.checkpoint_policies.save_only_these_names('kept')
    value = jax.jit(jax.checkpoint(f, policy=policy))(rows())
    assert value == jax.jit(f)(rows())


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="form='fp4'"):
        store(rows(), 'fp4')


def bits(form: str, dtype: str) -> str:
    """What is stored of some rows, which each dtype that holds float32 holds alike."""
    x = np.random.default_rng(0).standard_normal((5, 96)).astype('float32')
    stored = store(jnp.asarray(x).astype(dtype), form)
    assert dequantize(stored, dtype).dtype == dtype
    return hashlib.sha256(stored.payload.tobytes() + stored.exponents.tobytes()).hexdigest()


@pytest.mark.slow
def test_wide_types_switched_on_change_no_bit():
    source = textwrap.dedent(inspect.getsource(bits))
    code = f"""
import hashlib
import jax.numpy as jnp, numpy as np
from helios_jax.kernels.quantize import dequantize, store
{source}
for form in ('fp8', 'int8'):
    print(*(bits(form, dtype) for dtype in ('bfloat16', 'float32', 'float64')))
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | {'JAX_ENABLE_X64': '1', 'JAX_PLATFORMS': 'cpu'},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for form, line in zip(('fp8', 'int8'), done.stdout.splitlines(), strict=True):
        narrow, plain, wide = line.split()
        assert narrow == bits(form, 'bfloat16') != plain
        assert plain == wide == bits(form, 'float32')
