"""Hopper's kernels, as far as no GPU is needed: work lists, lowering, interpretation.

`helios bench moe --target=gpu --verify` compares their results with float64, on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from helios_jax.kernels.grouped_matmul import hopper
from helios_jax.kernels.grouped_matmul.hopper import block, weights
from helios_jax.kernels.grouped_matmul.hopper.block import Buffers
from helios_jax.kernels.grouped_matmul.hopper.tile import ROWS
from helios_jax.kernels.grouped_matmul.hopper.work import descending, running_sum, work_list

list_work = jax.jit(work_list, static_argnums=1)


def sizes_of(E: int, rows: int, spread: float, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.multinomial(rows, draw.dirichlet(np.full(E, spread))).astype(np.int32)


@pytest.mark.parametrize('spread', [0.1, 1.0, 9.0])
@pytest.mark.parametrize(('E', 'M', 'used'), [(1, 128, 0), (5, 1111, 1111), (56, 1003, 702)])
def test_work_list_gives_each_row_to_its_group(E, M, used, spread):
    sizes = np.append(sizes_of(E, used, spread, seed=E), M - used)
    ends = np.cumsum(sizes)
    work, count = list_work(sizes[:-1], M)
    owner = np.full(M, -1)
    for group, first, size in np.asarray(work)[: int(count[0])]:
        assert ends[group] - sizes[group] <= first
        assert first + size <= ends[group]
        # Only a group of fewer rows than a tile has a tile of fewer rows.
        assert size == min(ROWS, sizes[group])
        owner[first : first + size] = group
    np.testing.assert_array_equal(owner, np.repeat(np.arange(E + 1), sizes))


@pytest.mark.parametrize('E', [1, 7, 128])
def test_sums_and_order(E):
    sizes = sizes_of(E, 300, 1.0, seed=E)
    np.testing.assert_array_equal(running_sum(jnp.asarray(sizes)), np.cumsum(sizes))
    order = descending(jnp.asarray(sizes))
    np.testing.assert_array_equal(order, np.argsort(-sizes, kind='stable'))


@pytest.mark.slow
@pytest.mark.parametrize(('D', 'F'), [(256, 384), (128, 512)])
@pytest.mark.parametrize('M', [77, 1111])
def test_lowers_for_cuda_without_a_gpu(M, D, F):
    E = 3
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    lower = lambda f, *args: jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',)).as_text()
    transposed = lambda *arguments: hopper.multiply(*arguments, transposed=True)
    for text in (
        lower(hopper.multiply, of(M, D), of(E, D, F), sizes),
        lower(transposed, of(M, F), of(E, D, F), sizes),
        lower(hopper.weight_gradient, of(M, D), of(M, F), sizes),
    ):
        assert 'mosaic_gpu' in text


def one_view(rows, columns, out, full, empty):
    """Buffers whose views are all one reference: interpreted, a union's views share no bytes."""
    if hasattr(rows, 'get_ref_aval'):  # what is to be allocated, not yet a reference
        return Buffers(rows, columns, out, full, empty)
    return Buffers((rows, rows), (columns, columns), (out, out, out), full, empty)


def blank_rows(tile, first, last):
    row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    tile[...] = jnp.where((row >= first) & (row < last), tile[...], jnp.bfloat16(0))


@pytest.fixture
def interpreted(monkeypatch):
    """Function that runs a kernel on two interpreted multiprocessors."""
    if not hasattr(plgpu, 'force_gpu_interpret_mode'):
        pytest.skip('this jax does not interpret kernels for GPUs')
    monkeypatch.setattr(plgpu, 'RefUnion', lambda *views: views[0])
    monkeypatch.setattr(block, 'Buffers', one_view)
    monkeypatch.setattr(block, 'MULTIPROCESSORS', 2)
    monkeypatch.setattr(weights, 'blank', blank_rows)

    def run(kernel, *arguments, **options):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)):
            return np.asarray(kernel(*arguments), np.float64)

    return run


def operands(M, E, D, F, sizes, hurt):
    """Rows, weights, gradient and sizes; NaN in rows of no group and of the group `hurt`."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)
    ends = np.cumsum(sizes)
    nan = np.arange(M) >= ends[-1]
    nan[ends[hurt] - sizes[hurt] : ends[hurt]] = True
    spoil = lambda x: jnp.where(nan[:, None], jnp.nan, x)
    return spoil(normal(M, D)), normal(E, D, F), spoil(normal(M, F)), jnp.asarray(sizes, jnp.int32)


def assert_close(found, exact):
    assert np.linalg.norm(found - exact) <= 3e-3 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(1, 130, 1, 0, 17), (37, 0, 200, 0, 3)])
def test_interpreted_kernels_equal_float64(interpreted, sizes):
    M, E, D, F, hurt = 512, 5, 256, 128, 2  # nothing is read beyond M, where reads are clamped
    rows, matrices, gradient, groups = operands(M, E, D, F, sizes, hurt)
    out = interpreted(hopper.multiply, rows, matrices, groups)
    d_matrices = interpreted(hopper.weight_gradient, rows, gradient, groups)
    x, w, d = (np.asarray(each, np.float64) for each in (rows, matrices, gradient))
    assert not out[sum(sizes) :].any()
    for e in set(range(E)) - {hurt}:
        own = slice(sum(sizes[:e]), sum(sizes[: e + 1]))
        assert_close(out[own], x[own] @ w[e])
        assert_close(d_matrices[e], x[own].T @ d[own])


@pytest.mark.slow
def test_interpreted_kernel_has_no_races(interpreted):
    # No tile is moved back, or two blocks would write the same rows, though to the same bits.
    sizes, M, E, D, F = (37, 128, 256), 549, 3, 128, 384
    rows, matrices, _, groups = operands(M, E, D, F, sizes, hurt=1)
    out = interpreted(hopper.multiply, rows, matrices, groups, detect_races=True)
    x, w = np.asarray(rows, np.float64), np.asarray(matrices, np.float64)
    assert_close(out[165:421], x[165:421] @ w[2])
