"""A kernel's time from its schedule and the visits of its regions."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from helios_jax.plan.compiler import schedule, timing
from helios_jax.plan.compiler.timing import CHIPS, Step, Visits

DUMPS = Path(__file__).parent / 'dumps'


def test_steps_that_are_alike_are_counted_with_the_bytes_of_blocks_that_change():
    index = np.array([0, 0, 1, 1, 0])
    assert timing.changes(index).tolist() == [1, 0, 1, 0, 1]
    assert timing.changes(index, np.array([0, 1, 1, 1, 1])).tolist() == [1, 1, 1, 0, 1]
    runs = {'a': np.array([True, False, True]), 'b': np.array([2, 0, 2])}
    visits = timing.tally(runs, np.array([7, 5, 7]), batch=4)
    assert visits.bodies == ('a', 'b')
    assert [(s.number, s.runs, s.hbm_bytes) for s in visits.steps] == [
        (4, {'a': 0, 'b': 0}, 5),
        (8, {'a': 1, 'b': 2}, 7),
    ]


def test_a_prediction_adds_up_the_steps():
    chip = CHIPS['v5p']
    schedules = schedule.read(DUMPS / 'v5p', chip.delay_slots)
    both, one = (schedules[f'small_kernel_{name}.1'] for name in ('parallel', 'arbitrary'))
    steps = [Step(8, {'product': 5, 'clear': 1}, 0.0), Step(4, {'write': 1}, 0.0)]
    visits = Visits(('clear', 'product', 'write'), steps)
    for compiled, cores in ((both, 2), (one, 1)):
        found = timing.predict(compiled, visits, chip)
        assert found.num_cores == cores and found.grid_steps == 12 and found.waiting == 0
        every, outside = compiled.every_step, compiled.code.total - compiled.grid.total
        busy = 12 * every + 8 * (5 * 193 + 17) + 4 * 26
        assert found.cycles == outside + busy / cores
        assert found.seconds == pytest.approx(found.cycles / 1.75e9, rel=1e-3)
        assert found.mxu_share == pytest.approx(8 * 5 * 128 / 4 / cores / found.cycles)

    # A step whose blocks take longer than its bundles waits for them.
    slow = 1e-3 * chip.hbm_bytes_per_second
    found = timing.predict(one, visits._replace(steps=[Step(3, {}, slow)]), chip)
    assert found.seconds == pytest.approx(3e-3, rel=1e-3)
    assert found.waiting == pytest.approx(found.cycles, rel=1e-3)
    assert found.hbm_bytes == 3 * slow


def test_visits_of_another_kernel_are_refused_with_the_tree():
    compiled = schedule.read(DUMPS / 'v5e', 4)['small_kernel_parallel.1']
    with pytest.raises(ValueError, match=r'2 bodies \(clear, write\).*has 3') as caught:
        timing.predict(compiled, Visits(('clear', 'write'), []), CHIPS['v5e'])
    assert str(compiled.grid) in str(caught.value)


def test_a_copy_behind_the_bodies_is_part_of_every_step():
    """XLA puts the result in VMEM, and a finished block is copied there. Work is still refused."""
    chip = CHIPS['v5e']
    compiled = schedule.read(DUMPS / 'v5e', 4)['small_kernel_parallel.1']
    visits = Visits(('clear', 'product'), [Step(3, {'product': 1}, 0.0)])
    with pytest.raises(ValueError, match='has 3'):
        timing.predict(compiled, visits, chip)
    write = compiled.bodies[-1]
    idle = dict.fromkeys(write.busy, 0)
    copy = dataclasses.replace(write, busy=idle | {'VLOAD': 20, 'VSTORE': 20})
    assert copy.copies
    assert not write.copies

    def replaced(region):
        inner = tuple(copy if r == write else replaced(r) for r in region.inner)
        return dataclasses.replace(region, inner=inner)

    copying = dataclasses.replace(compiled, code=replaced(compiled.code))
    found = timing.predict(copying, visits, chip)
    assert set(found.bodies) == {'clear', 'product'}
    assert found.every_step == compiled.every_step + write.cycles


def test_clocks_follow_from_the_peaks():
    clocks = {target: round(chip.clock / 1e9, 2) for target, chip in CHIPS.items()}
    assert clocks == {'v5e': 1.50, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 2.20}
