"""Rows are copied and summed as indexing does, by XLA and by the TPU's kernels, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels import permutation
from helios_jax.kernels.permutation import gpu, tpu

pytestmark = pytest.mark.usefixtures('quick_compilation')
RACE = 'RACE DETECTED'  # printed by jax 0.10, raised since
N, M, A, X = 48, 64, 32, 3


def rows(num_rows: int, width: int) -> jax.Array:
    """Random bfloat16 rows, with what is hard to take apart: NaN, infinity, −0, subnormals."""
    x = np.random.default_rng(0).standard_normal((num_rows, width)).astype(np.float32)
    x[3, 5], x[4, -1], x[5, 0], x[6, width // 2] = np.nan, np.inf, -0.0, 1e-39
    return jnp.asarray(x, jnp.bfloat16)


def index(*shape: int, below: int) -> jax.Array:
    """Random indices, with the first, the last, one beyond, and those of `rows`' hard values."""
    found = np.random.default_rng(1).integers(0, below, shape, np.int32)
    found.flat[:7] = 0, below - 1, below + 7, 3, 4, 5, 6
    return jnp.asarray(found)


@pytest.fixture
def interpreted(capsys):
    yield pltpu.InterpretParams(detect_races=True)
    assert RACE not in capsys.readouterr().out


# 128 words are one sublane of eight, 2560 columns ten of sixteen.
@pytest.mark.parametrize('width', [256, pytest.param(2560, marks=pytest.mark.slow)])
def test_kernel_copies_every_bit(interpreted, width):
    x, at = rows(N, width), index(M, below=N)
    found = tpu.take(x, at, interpret=interpreted)
    expected = np.asarray(x)[np.minimum(at, N - 1)]
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize('width', [256, pytest.param(2560, marks=pytest.mark.slow)])
def test_kernel_sums_in_float32(interpreted, width):
    x, at = rows(N, width), index(A, X, below=N)
    found = tpu.take_sums(x, at, interpret=interpreted)
    terms = np.asarray(x, np.float32)[np.minimum(at, N - 1)]
    expected = jnp.asarray((terms[:, 0] + terms[:, 1]) + terms[:, 2], jnp.bfloat16)
    np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))


# 384 and 2560 columns are no power of two, 63 rows fill no program.
@pytest.mark.parametrize(('width', 'length'), [(384, M), (2560, M - 1)])
def test_the_kernel_for_gpus_copies_every_bit(width, length):
    x, at = rows(N, width), index(length, below=N)
    assert not gpu.refusal(x, length)
    found = gpu.take(x, at, interpret=True)
    expected = np.asarray(x)[np.minimum(at, N - 1)]
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    ('shape', 'dtype', 'length'),
    [
        ((N, 200), 'bfloat16', M),
        ((N, 256), 'float32', M),
        ((N, 256), 'bfloat16', 0),
        ((2**23, 256), 'bfloat16', M),
        ((N, 256), 'bfloat16', 2**23),
    ],
)
def test_what_the_kernel_for_gpus_cannot_take(shape, dtype, length):
    found = []
    of = lambda x: found.append(gpu.refusal(x, length))
    jax.eval_shape(of, jax.ShapeDtypeStruct(shape, dtype))
    assert found[0].startswith('the kernel copies')


def test_without_a_tpu_it_is_indexing():
    x = rows(N, 24).astype(jnp.float32)
    at, several = index(7, below=N), index(5, X, below=N)
    np.testing.assert_array_equal(permutation.take(x, at), x[np.minimum(at, N - 1)])
    expected = np.asarray(x)[np.minimum(several, N - 1)].sum(axis=1)
    np.testing.assert_allclose(permutation.take_sums(x, several), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ('dtype', 'width', 'length', 'summed', 'rows_a_step'),
    [
        ('bfloat16', 2048, 131072, 1, 512),
        ('bfloat16', 2048, 16384, 8, 64),
        ('bfloat16', 4096, 16384, 14, 32),
        ('bfloat16', 8192, 16384, 8, 32),
        ('bfloat16', 2048, 48, 1, 16),
    ],
)
def test_steps_are_as_large_as_fit(monkeypatch, dtype, width, length, summed, rows_a_step):
    monkeypatch.setattr(tpu, 'generation', lambda: 'v5e')
    assert tpu.refusal(jnp.zeros((4096, width), dtype), length, summed) == ''
    assert tpu.rows_a_step(width, length, summed, 1) == rows_a_step


@pytest.mark.parametrize(
    ('target', 'dtype', 'width', 'length', 'reason'),
    [
        ('v5p', 'bfloat16', 2048, 16 * 3, 'no steps that divide 48 rows and 4096'),
        ('v5e', 'bfloat16', 2048, 40, 'no steps that divide 40 rows'),
        ('v5e', 'bfloat16', 2112, 4096, 'width of 2112: it must be a multiple of 256'),
        ('v5e', 'float32', 2048, 4096, 'float32: only bfloat16'),
        ('tpu7x', 'bfloat16', 2048, 4096, 'SparseCores gather'),
    ],
)
def test_what_kernels_refuse_xla_takes_and_the_log_says_why(
    monkeypatch, caplog, target, dtype, width, length, reason
):
    monkeypatch.setattr(tpu, 'generation', lambda: target)
    permutation.log_refusal.cache_clear()
    caplog.set_level('INFO', 'helios_jax')
    x, at = jnp.ones((4096, width), dtype), jnp.zeros(length, jnp.int32)
    assert permutation.take(x, at, 'tpu').shape == (length, width)
    permutation.take(x, at, 'tpu')
    [said] = caplog.messages
    assert reason in said and 'XLA' in said
