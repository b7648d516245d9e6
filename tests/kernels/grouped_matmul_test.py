"""The grouped matmul's implementations against a float64 loop over groups, by the worst group."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels import grouped_matmul as door
from helios_jax.kernels.grouped_matmul import grouped_matmul, tpu
from helios_jax.kernels.grouped_matmul.tpu import work
from helios_jax.kernels.grouped_matmul.tpu.tiles import GradientTiles, MultiplyTiles

pytestmark = pytest.mark.usefixtures('quick_compilation')

RACES = pltpu.InterpretParams(detect_races=True)
RACE = 'RACE DETECTED'  # printed by jax 0.10, raised since
D, F = 256, 128
# Small, so that few rows take all paths: several tiles, blocks and pieces of each size.
MULTIPLY = MultiplyTiles(64, 128, (32, 16), (128, 128))
GRADIENT = GradientTiles(64, 128, 128, (32, 16), (128, 128))
SIZES = {
    'few': (0, 9, 0, 40, 1),
    'one': (90,),
    'all to the second': (0, 97),
    'empty first, middle and last': (0, 1, 70, 0, 33, 0),
    'single rows': (1, 1, 65, 1, 1, 1, 61, 1),
    'nothing': (0, 0, 0),
    'fills tiles': (64, 128, 64),
    'every residue modulo 16': (17, 1, 33, 17, 1, 1, 17, 1, 49, 1, 17, 1, 1, 17, 1, 1, 33),
}


@pytest.fixture
def interpreted(monkeypatch, capsys):
    """Puts our kernels, interpreted, in the door's table; a race is an error."""
    how = {'interpret': RACES}
    row = door.IMPLEMENTATIONS['tpu']
    row = row._replace(
        multiply=functools.partial(row.multiply, chosen=MULTIPLY, **how),
        weight_gradient=functools.partial(row.weight_gradient, chosen=GRADIENT, **how),
    )
    monkeypatch.setitem(door.IMPLEMENTATIONS, 'tpu', row)
    yield
    pltpu.reset_tpu_interpret_mode_state()  # after a failure it would spoil the next test
    assert RACE not in capsys.readouterr().out


def problem(sizes, dtype, beyond=20):
    """x [M D], weights [E D F], the result's gradient [M F], sizes; NaN in rows of no group."""
    rng, M = np.random.default_rng(len(sizes)), sum(sizes) + beyond
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, weights, gradient = draw(M, D), draw(len(sizes), D, F), draw(M, F)
    x[sum(sizes) :] = gradient[sum(sizes) :] = np.nan
    x[-1:] = gradient[-1:] = np.inf
    arrays = [jnp.asarray(a, dtype) for a in (x, weights, gradient)]
    return *arrays, np.asarray(sizes, np.int32)


def products(x, weights, gradient, sizes, name):
    """Result, gradient of x and gradient of the weights, through the door."""
    platform = 'tpu' if name == 'tpu' else 'cpu'

    def run(x, weights, gradient, sizes):
        multiply = functools.partial(
            grouped_matmul, group_sizes=sizes, implementation=name, platform=platform
        )
        y, backward = jax.vjp(multiply, x, weights)
        return y, *backward(gradient)

    # Interpreted kernels wait for their arguments on threads that a jit would take.
    run = run if name == 'tpu' else jax.jit(run)
    return [np.asarray(a) for a in run(x, weights, gradient, jnp.asarray(sizes))]


def loop(x, weights, gradient, sizes, dot):
    """The same, group by group: lists of the groups' results."""
    ends = np.cumsum(sizes)
    spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [
        [dot(x[at], weights[e]) for e, at in enumerate(spans)],
        [dot(gradient[at], weights[e].T) for e, at in enumerate(spans)],
        [dot(x[at].T, gradient[at]) for at in spans],
    ], spans


def in_float64(x, y):
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64)


def plain(x, y):
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return np.asarray(jnp.dot(x, y, precision=exact), np.float64)


def check_errors(found, x, weights, gradient, sizes):
    exact, spans = loop(x, weights, gradient, sizes, in_float64)
    rounded, _ = loop(x, weights, gradient, sizes, plain)
    for which, (result, dtype) in enumerate(zip(found, (x.dtype,) * 3, strict=True)):
        assert result.dtype == dtype
        groups = result if which == 2 else [result[at] for at in spans]
        for e, group in enumerate(groups):
            truth, near = exact[which][e], rounded[which][e]
            if not truth.size:
                continue
            largest = np.abs(truth).max()
            allowed = 2 * np.abs(near - truth).max() + 1e-6 * largest
            assert np.abs(group.astype(np.float64) - truth).max() <= allowed, (which, e)
        if which < 2:
            assert not result[sum(sizes) :].any()
    for e in np.flatnonzero(np.asarray(sizes) == 0):
        assert not found[2][e].any()


def cases(quick=()):
    for name in SIZES:
        for dtype in ('bfloat16', 'float32'):
            num_hard = (name not in quick) + (dtype == 'float32')
            mark = ((), pytest.mark.slow, pytest.mark.long)[num_hard]
            yield pytest.param(name, dtype, marks=mark, id=f'{name}-{dtype}')


@pytest.mark.parametrize(('sizes', 'dtype'), cases())
def test_kernels_equal_a_loop_over_groups(interpreted, sizes, dtype):
    arrays = problem(SIZES[sizes], dtype)
    check_errors(products(*arrays, 'tpu'), *arrays)


@pytest.mark.parametrize(('sizes', 'dtype'), cases(quick=('few',)))
def test_the_reference_equals_a_loop_over_groups(sizes, dtype):
    arrays = problem(SIZES[sizes], dtype)
    check_errors(products(*arrays, 'reference'), *arrays)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('name', [pytest.param('tpu', marks=pytest.mark.slow), 'reference'])
def test_a_group_keeps_its_nan_to_itself(interpreted, name, bad):
    """Neighbours of a group share its tiles, and their results are the same to the bit."""
    sizes, ill = (21, 30, 5, 17, 40), 2
    x, weights, gradient, sizes = problem(sizes, 'bfloat16')
    clean = products(x, weights, gradient, sizes, name)
    end = int(np.cumsum(sizes)[ill])
    rows = slice(end - int(sizes[ill]), end)
    x, gradient = x.at[rows].set(bad), gradient.at[rows].set(bad)
    found = products(x, weights, gradient, sizes, name)
    for which, (before, after) in enumerate(zip(clean, found, strict=True)):
        own = ill if which == 2 else rows
        assert not np.isfinite(after[own]).all()
        np.testing.assert_array_equal(np.delete(after, own, 0), np.delete(before, own, 0))


@pytest.mark.slow
@pytest.mark.parametrize('M', [5, 100, 300])
def test_the_tiles_that_are_chosen_for_few_rows(M):
    rng = np.random.default_rng(M)
    sizes = np.array([M // 2, 0, M // 3], np.int32)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    D, F = 130, 72  # no multiples of a register's lanes
    x, weights, gradient = draw(M, D), draw(3, D, F), draw(M, F)
    sizes = jnp.asarray(sizes)
    found = [
        tpu.multiply(x, weights, sizes, interpret=RACES),
        tpu.multiply(gradient, weights, sizes, transposed=True, interpret=RACES),
        tpu.weight_gradient(x, gradient, sizes, interpret=RACES),
    ]
    check_errors([np.asarray(a) for a in found], x, weights, gradient, sizes)


@pytest.mark.slow
def test_cores_share_the_columns(interpreted):
    _, weights, gradient, sizes = problem((20, 0, 33), 'bfloat16')
    chosen = MULTIPLY._replace(cores=2)
    multiply = functools.partial(tpu.multiply, transposed=True, interpret=RACES)
    sizes = jnp.asarray(sizes)
    found = [multiply(gradient, weights, sizes, chosen=c) for c in (MULTIPLY, chosen)]
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_under_vmap_and_scan():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    x, weights = draw(2, 90, D), draw(2, 3, D, F)
    sizes = jnp.asarray([[30, 0, 55], [1, 89, 0]], jnp.int32)
    multiply = functools.partial(tpu.multiply, interpret=pltpu.InterpretParams(), chosen=MULTIPLY)
    alone = np.stack([multiply(*case) for case in zip(x, weights, sizes, strict=True)])
    np.testing.assert_array_equal(jax.vmap(multiply)(x, weights, sizes), alone)
    _, scanned = jax.lax.scan(lambda _, case: (None, multiply(*case)), None, (x, weights, sizes))
    np.testing.assert_array_equal(scanned, alone)


@pytest.mark.parametrize('tile', [16, 64])
@pytest.mark.parametrize('sizes', SIZES)
def test_work_covers_each_row_once(sizes, tile):
    sizes = np.asarray(SIZES[sizes], np.int32)
    ends = np.cumsum(sizes)
    M = int(ends[-1]) + 20
    owner = np.searchsorted(ends, np.arange(M), side='right')
    tiles = -(-M // tile)
    makes = [jax.jit(make, static_argnums=(1, 2)) for make in (work.of_tiles, work.of_groups)]
    lists = [make(jnp.asarray(sizes), M, tile) for make in makes]
    for listed in lists:
        count = int(listed.length)
        group, at, begin, end = (np.asarray(a)[:count] for a in listed.items[:4])
        assert count <= tiles + len(sizes) - 1 == len(listed.items.group)
        rows = [
            np.arange(t * tile + b, t * tile + e) for t, b, e in zip(at, begin, end, strict=True)
        ]
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(ends[-1]))
        for g, r in zip(group, rows, strict=True):
            assert (owner[r] == g).all()
        assert (np.diff(at) >= 0).all()
    assert set(lists[0].items.tile.tolist()) == set(range(tiles))
    assert set(lists[1].items.group.tolist()) == set(range(len(sizes)))


@pytest.mark.parametrize('sizes', SIZES)
def test_groups_with_rows_take_turns(sizes):
    sizes = np.asarray(SIZES[sizes], np.int32)
    turns = jax.jit(work.turns, static_argnums=1)(jnp.asarray(sizes), int(sizes.sum()))
    order = np.flatnonzero(sizes)
    assert turns.total.tolist() == [len(order)]
    np.testing.assert_array_equal(turns.place[order], np.arange(len(order)))
    np.testing.assert_array_equal(turns.after[order], np.roll(order, -1))


def test_wrong_arrays_are_named():
    x, weights, sizes = jnp.zeros((6, 4)), jnp.zeros((3, 4, 5)), jnp.zeros(3, jnp.int32)
    door.check(x, weights, sizes)
    for arrays, name in (
        ((x[0], weights, sizes), 'x'),
        ((x, weights[0], sizes), 'weights'),
        ((x[:, :3], weights, sizes), 'weights'),
        ((x, weights[:0], sizes[:0]), 'weights'),
        ((x.astype(jnp.bfloat16), weights, sizes), 'weights'),
        ((x.astype(int), weights.astype(int), sizes), 'x'),
        ((x, weights, sizes[:2]), 'group_sizes'),
        ((x, weights, sizes.astype(float)), 'group_sizes'),
    ):
        with pytest.raises(ValueError, match=f'^{name} '):
            door.check(*arrays)


def test_what_a_kernel_cannot_take_is_refused_or_logged(caplog):
    wide = jnp.zeros((6, 4), jnp.float16), jnp.zeros((3, 4, 5), jnp.float16)
    with pytest.raises(NotImplementedError, match='float16'):
        door.choose(*wide, 'tpu', 'tpu')
    with pytest.raises(NotImplementedError, match='platform'):
        door.choose(*wide, 'tpu', 'cpu')
    with pytest.raises(ValueError, match='implementation'):
        door.choose(*wide, 'best', None)
    door.log_choice.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert door.choose(*wide, 'auto', 'tpu') == 'reference'
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert 'float16' in record.message
    assert door.choose(*wide, 'auto', 'cpu') == 'reference'
    assert door.choose(*wide, 'auto', 'gpu') == 'reference'
    narrow = [a.astype(jnp.bfloat16) for a in wide]
    assert door.choose(*narrow, 'auto', 'tpu') == 'tpu'
