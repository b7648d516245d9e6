"""Hopper's kernels, as far as no GPU is needed: their work lists, and lowering.

`python -m helios_jax.bench.moe_gpu --verify` compares their results with float64, on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.kernels.grouped_matmul import hopper
from helios_jax.kernels.grouped_matmul.hopper.block import ROWS
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
