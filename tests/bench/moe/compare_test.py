"""Grouped matmuls by their schedules."""

import numpy as np
import pytest

from helios_jax import process
from helios_jax.bench.moe import compare, megablox, ours, permutation, task
from helios_jax.bench.moe.problem import LOADS, PRODUCTS, SHAPES, WEIGHTS, GroupedProblem
from helios_jax.chips import CHIPS
from helios_jax.errors import UserError

SMALL = GroupedProblem(num_rows=4096, experts=4, embed_dim=512, expert_dim=1024)


@pytest.mark.parametrize('load', LOADS)
@pytest.mark.parametrize('shape', SHAPES)
def test_all_rows_have_an_expert(shape, load):
    problem = GroupedProblem(*SHAPES[shape], load=load)
    sizes = problem.group_sizes
    assert sizes.sum() == problem.num_rows
    ratio = sizes.max() / sizes.min()
    assert ratio == pytest.approx(1.0 if load == 'even' else 4.0, rel=0.01)


@pytest.mark.parametrize('product', PRODUCTS)
def test_visits_add_up_to_the_work(product):
    """Products of even groups multiply each row once; copies are of all operands at least."""
    [options] = ours.variants(SMALL, product, 'v5p')
    tiles, visits = options['tiles'], ours.candidate(SMALL, product, options, 'v5p').visits
    across = tiles.height * tiles.width if product == WEIGHTS else tiles.columns
    steps = dict(zip(tiles.sizes, tiles.steps, strict=True))
    rows = sum(
        step.number * step.runs[f'product/{size}'] * size * part
        for step in visits.steps
        for size, part in steps.items()
    )
    rows /= tiles.height if product == WEIGHTS else tiles.columns
    blocks = 512 * 1024 / across if product == WEIGHTS else SMALL_WIDTH[product] / across
    assert rows == SMALL.num_rows * blocks
    moved = sum(step.number * step.hbm_bytes for step in visits.steps)
    floor = SMALL.floor_seconds(CHIPS['v5p'])['bytes'] * CHIPS['v5p'].hbm_bytes_per_second
    assert moved >= 0.99 * floor


SMALL_WIDTH = {PRODUCTS[0]: 1024, PRODUCTS[1]: 512}


def test_rows_stand_beside_floors_and_ours():
    row = {'target': 'v5p', 'problem': {**SHAPE, 'load': 'even'}, 'seconds': 2.0}
    rows = [
        row | {'implementation': task.OURS},
        row | {'implementation': 'megablox', 'seconds': 5.0},
        row | {'implementation': 'megablox', 'seconds': 3.0},
        row | {'implementation': 'megablox', 'refused': 'VMEM', 'options': {}},
    ]
    mine, peer = compare.fastest(rows)
    assert (mine['times_ours'], peer['times_ours']) == (1.0, 1.5)
    assert mine['share_of_dense'] == pytest.approx(mine['floor_seconds']['flops'] / 2.0)


SHAPE = {'num_rows': 4096, 'experts': 4, 'embed_dim': 512, 'expert_dim': 1024}


def test_unknown_names_are_refused():
    how = {'names': [], 'jobs': 1, 'as_json': False}
    for target, shapes, names in (('v4', [], []), ('v5p', ['e9'], []), ('v5p', [], ['mine'])):
        with pytest.raises(UserError, match='there are'):
            compare.compare_products(target, shapes, **how | {'names': names})


@pytest.mark.slow
def test_megablox_visits_are_those_of_its_lists():
    visits = megablox.multiply_visits(SMALL, PRODUCTS[0], (512, 256, 512), 2)
    runs = {name: sum(s.number * s.runs[name] for s in visits.steps) for name in visits.bodies}
    assert runs == {'zero': 16, 'last': 16, 'not_last': 16}
    assert np.isclose(sum(s.number for s in visits.steps), 32)


@pytest.mark.slow
@pytest.mark.parametrize('product', PRODUCTS)
def test_both_cores_of_v5p_are_busy(monkeypatch, product):
    pytest.importorskip('libtpu')
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')  # as the command does: libtpu reads flags but once
    [options] = ours.variants(SMALL, product, 'v5p')
    made = task.GroupedTask('v5p', [{**SHAPE, 'load': 'even'}], product, task.OURS, options)
    [row] = process.run(task.compile_task, made._asdict())
    assert row['num_cores'] == 2
    assert row['seconds'] < 1.5 * SMALL.floor_seconds(CHIPS['v5p'])['flops']


def test_permutations_of_both_stand_beside_each_other(monkeypatch):
    asked = []

    def alone(function, name, *arguments):
        assert function is permutation.seconds_here
        asked.append((name, *arguments))
        return 0.5 if name == permutation.OURS else 2.0

    monkeypatch.setattr(process, 'run', alone)
    rows = permutation.compare_rows('v5p', SMALL)
    assert asked == [
        (name, 'v5p', what, 4096, 512)
        for what in permutation.PERMUTATIONS
        for name in (permutation.OURS, permutation.XLA)
    ]
    assert [row['times_ours'] for row in rows] == [1.0, 4.0, 1.0, 4.0]
    assert permutation.describe(rows[3]).endswith('2000.000 ms 4.00 × helios')
    assert permutation.describe(rows[0]).endswith('500.000 ms')


@pytest.mark.slow
def test_permutations_are_bound_by_their_bytes_and_xlas_are_not():
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")
    problem = GroupedProblem(*SHAPES['e128'])
    found = permutation.compare_rows('v5p', problem)
    rows, row_bytes = problem.num_rows, 2 * problem.embed_dim
    # Rows are read, and written, or laid out before.
    least = 2 * rows * row_bytes / CHIPS['v5p'].hbm_bytes_per_second
    for what in permutation.PERMUTATIONS:
        mine, peer = (row for row in found if row['permutation'] == what)
        assert least < mine['seconds'] < 1.8 * least, what
        assert peer['times_ours'] > 2.5, what
