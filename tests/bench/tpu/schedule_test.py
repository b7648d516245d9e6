"""Reading schedules: a program by hand, and the dumps of a small kernel of our own."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_jax.bench import tpu_schedule, tpu_timing
from helios_jax.bench.tpu_timing import CHIPS, Plan, Step

DUMPS = Path(__file__).parent / 'dumps'
UNITS = ['MXU', 'XLU', 'VALU', 'VPOP', 'EUP', 'VLOAD', 'VLOAD:FILL', 'VSTORE', 'VSTORE:SPILL',
         'SALU']  # fmt: skip

# A loop whose step is in a branch, and in it another branch. One bundle after a branch runs anyway.
BUNDLES = """
= control target key start
LB: loop body
     0   :  { prologue }
   0x1 LB: > { step } /* Start region 1 */
   0x2   : > { %4 = sbr.rel (%p1) target = $region5 }
   0x3   :  {}
   0x4   : > { %5 = sbr.rel (%p2) target = $region6  ;;  other }
   0x5   :  {}
   0x6   : > { work } /* Start region 2 :: End region 9 */
   0x7   :  {}
   0x8   : > { work }
   0x9 PF: > { step } /* Start/End empty region 6 :: Start region 7 */
   0xa   : > { multiply }
   0xb   : > { work }
   0xc PF: > { step } /* Start/End empty region 5 */
   0xd   : > { %6 = sbr.rel (!%p3) target = $region1 }
   0xe   :  {}
   0xf   :  { epilogue }
"""


def row(**counts: int) -> list[int]:
    return [counts.get(unit, 0) for unit in UNITS]


SCALAR, IDLE, WORK, MULTIPLY = row(SALU=1), row(), row(VALU=9, VSTORE=1), row(MXU=4)
FINAL = [SCALAR, SCALAR, SCALAR, IDLE, SCALAR, IDLE, WORK, IDLE, WORK, SCALAR, MULTIPLY, WORK,
         SCALAR, SCALAR, IDLE, SCALAR]  # fmt: skip
# Two cycles more between the inner branch's bundles, three more for the product.
CYCLES = [*FINAL[:7], IDLE, IDLE, *FINAL[7:10], *[MULTIPLY] * 3, *FINAL[10:]]


def utilization(rows: list[list[int]]) -> str:
    lines = [' '.join(map(str, r)) for r in rows]
    head = ['== CAPACTIY:', ', '.join(UNITS), '4 3 4 2 1 3 3 1 1 2', '== UTILIZATION:']
    return '\n'.join([*head, *lines]) + '\n'


def by_hand() -> tpu_schedule.Schedule:
    return tpu_schedule.parse(BUNDLES, utilization(FINAL), utilization(CYCLES), 1)


def test_a_program_by_hand_is_a_tree_of_cycles():
    code = by_hand().code
    (loop,) = code.inner
    (step,) = loop.inner
    (inner,) = step.inner
    assert [(r.kind, r.start, r.cycles) for r in (code, loop, step, inner)] == [
        ('kernel', 0, 2),
        ('loop', 1, 6),
        ('predicated', 4, 8),
        ('predicated', 6, 5),
    ]
    assert code.total == len(CYCLES) == 21
    assert step.busy == dict(zip(UNITS, row(MXU=16, VALU=9, VSTORE=1, SALU=2), strict=True))
    assert (inner.busy['VALU'], inner.busy['MXU'], loop.busy['SALU']) == (18, 0, 4)


def test_the_branch_around_the_step_is_no_body():
    schedule = by_hand()
    assert schedule.grid.start == 1
    assert [(body.start, body.cycles) for body in schedule.bodies] == [(6, 5)]
    assert schedule.every_step == 6 + 8


@given(st.data())
def test_waiting_cycles_go_to_the_bundle_before(data):
    """Whatever idle cycles the final program leaves out, its bundles get all of them."""
    kinds = st.sampled_from([SCALAR, IDLE, WORK, MULTIPLY])
    cycles = [SCALAR, *data.draw(st.lists(kinds, max_size=30)), SCALAR]
    kept = [r for r in cycles if r in (SCALAR, WORK) or data.draw(st.booleans(), label='kept')]
    stretched = tpu_schedule.stretch(UNITS, kept, cycles)
    assert len(stretched) == len(kept)
    assert [r for rows in stretched for r in rows] == cycles
    issues = [r for r in kept if r in (SCALAR, WORK)]
    assert [rows[0] for rows in stretched if rows[0] in (SCALAR, WORK)] == issues


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(AssertionError, match='disagree'):
        tpu_schedule.stretch(UNITS, [SCALAR, WORK], [SCALAR, row(VLOAD=1)])
    with pytest.raises(AssertionError, match='length'):
        tpu_schedule.stretch(UNITS, [SCALAR, WORK], [SCALAR])
    with pytest.raises(AssertionError, match='15'):
        tpu_schedule.parse(BUNDLES, utilization(FINAL[1:]), utilization(CYCLES), 1)


@pytest.mark.parametrize(
    ('target', 'semantics', 'one_core'),
    [('v5e', 'parallel', False), ('v5p', 'parallel', False), ('v5p', 'arbitrary', True)],
)
def test_the_small_kernel(target, semantics, one_core):
    """small_kernel.py: a branch that clears, one with a loop of products, one that writes."""
    schedules = tpu_schedule.read(DUMPS / target, CHIPS[target].delay_slots)
    schedule = schedules[f'small_kernel_{semantics}.1']
    assert schedule.one_core is one_core
    clear, product, write = schedule.bodies
    assert [r.kind for r in schedule.bodies] == ['predicated', 'loop', 'predicated']
    # 128 × 128 × 128 multiply-adds, 16,384 a cycle.
    assert [r.busy['MXU'] for r in schedule.bodies] == [0, 128, 0]
    assert clear.busy['VSTORE'] == product.busy['VSTORE'] == write.busy['EUP'] == 16
    assert (clear.cycles, product.cycles) == (17, 193)
    assert clear.start < product.start < write.start
    dump = DUMPS / target / f'1-small_kernel_{semantics}.1-00-{tpu_schedule.FILES[2]}.txt'
    rows = dump.read_text().split('UTILIZATION:\n')[1].splitlines()
    assert schedule.code.total == len(rows)
    assert schedule.every_step + sum(r.cycles for r in schedule.bodies) == schedule.grid.total
    assert 'loop at' in str(schedule.code) and 'MXU 128' in str(schedule.code)


def test_a_prediction_adds_up_the_steps():
    chip = CHIPS['v5p']
    schedules = tpu_schedule.read(DUMPS / 'v5p', chip.delay_slots)
    both, one = (schedules[f'small_kernel_{name}.1'] for name in ('parallel', 'arbitrary'))
    steps = [Step(8, {'product': 5, 'clear': 1}, 0.0), Step(4, {'write': 1}, 0.0)]
    plan = Plan(('clear', 'product', 'write'), steps)
    for schedule, cores in ((both, 2), (one, 1)):
        found = tpu_timing.predict(schedule, plan, chip)
        assert found.num_cores == cores and found.grid_steps == 12 and found.waiting == 0
        every, outside = schedule.every_step, schedule.code.total - schedule.grid.total
        busy = 12 * every + 8 * (5 * 193 + 17) + 4 * 26
        assert found.cycles == outside + busy / cores
        assert found.seconds == pytest.approx(found.cycles / 1.75e9, rel=1e-3)
        assert found.mxu_share == pytest.approx(8 * 5 * 128 / 4 / cores / found.cycles)

    # A step whose blocks take longer than its bundles waits for them.
    slow = 1e-3 * chip.hbm_bytes_per_second
    found = tpu_timing.predict(one, plan._replace(steps=[Step(3, {}, slow)]), chip)
    assert found.seconds == pytest.approx(3e-3, rel=1e-3)
    assert found.waiting == pytest.approx(found.cycles, rel=1e-3)
    assert found.hbm_bytes == 3 * slow


def test_a_plan_for_another_kernel_is_refused_with_the_tree():
    schedule = tpu_schedule.read(DUMPS / 'v5e', 4)['small_kernel_parallel.1']
    with pytest.raises(ValueError, match=r'2 bodies \(clear, write\).*has 3') as caught:
        tpu_timing.predict(schedule, Plan(('clear', 'write'), []), CHIPS['v5e'])
    assert str(schedule.grid) in str(caught.value)


def test_a_copy_behind_the_bodies_is_part_of_every_step():
    """Of a block of the result, where XLA puts that in VMEM. Work there is still refused."""
    chip = CHIPS['v5e']
    schedule = tpu_schedule.read(DUMPS / 'v5e', 4)['small_kernel_parallel.1']
    plan = Plan(('clear', 'product'), [Step(3, {'product': 1}, 0.0)])
    with pytest.raises(ValueError, match='has 3'):
        tpu_timing.predict(schedule, plan, chip)
    write = schedule.bodies[-1]
    idle = dict.fromkeys(write.busy, 0)
    copy = dataclasses.replace(write, busy=idle | {'VLOAD': 20, 'VSTORE': 20})
    assert copy.copies
    assert not write.copies

    def replaced(region):
        inner = tuple(copy if r == write else replaced(r) for r in region.inner)
        return dataclasses.replace(region, inner=inner)

    copying = dataclasses.replace(schedule, code=replaced(schedule.code))
    found = tpu_timing.predict(copying, plan, chip)
    assert set(found.bodies) == {'clear', 'product'}
    assert found.every_step == schedule.every_step + write.cycles


def test_clocks_follow_from_the_peaks():
    clocks = {target: round(chip.clock / 1e9, 2) for target, chip in CHIPS.items()}
    assert clocks == {'v5e': 1.50, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 2.20}


def test_a_name_compiled_again_replaces_the_first(tmp_path):
    for time, cycles in ((1, CYCLES), (2, FINAL)):
        texts = BUNDLES, utilization(FINAL), utilization(cycles)
        for part, text in zip(tpu_schedule.FILES, texts, strict=True):
            (tmp_path / f'{time}-fusion.3-0{time}-{part}.txt').write_text(text)
    (tmp_path / '1-half-00-final_bundles.txt').write_text(BUNDLES)
    (tmp_path / '1-fusion.3-00-schedule-analysis_final_bundles.txt').write_text('')
    (schedule,) = tpu_schedule.read(tmp_path, 1).values()
    assert schedule.code.total == len(FINAL)


@pytest.mark.slow
def test_the_dumps_are_what_the_compiler_makes(tmp_path):
    """Only that it can be read: another libtpu may schedule otherwise."""
    pytest.importorskip('libtpu')
    script = Path(__file__).with_name('small_kernel.py')
    command = [sys.executable, str(script), 'v6e', str(tmp_path)]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    schedules = tpu_schedule.read(tmp_path, CHIPS['v6e'].delay_slots)
    assert len(schedules) == 2, json.dumps(sorted(p.name for p in tmp_path.iterdir()))
    for schedule in schedules.values():
        (product,) = [region for region in schedule.bodies if region.busy['MXU']]
        assert product.kind == 'loop'
