"""Reading schedules: a program by hand, and the dumps of a small kernel of our own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tpu_by_hand import (
    BUNDLES,
    CYCLES,
    FINAL,
    IDLE,
    MULTIPLY,
    SCALAR,
    UNITS,
    WORK,
    by_hand,
    row,
    utilization,
)

from helios_jax.plan.compiler import schedule
from helios_jax.plan.compiler.timing import CHIPS

DUMPS = Path(__file__).parent / 'dumps'


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
    compiled = by_hand()
    assert compiled.grid.start == 1
    assert [(body.start, body.cycles) for body in compiled.bodies] == [(6, 5)]
    assert compiled.every_step == 6 + 8


@given(st.data())
def test_waiting_cycles_go_to_the_bundle_before(data):
    """Whatever idle cycles the final program leaves out, its bundles get all of them."""
    kinds = st.sampled_from([SCALAR, IDLE, WORK, MULTIPLY])
    cycles = [SCALAR, *data.draw(st.lists(kinds, max_size=30)), SCALAR]
    kept = [r for r in cycles if r in (SCALAR, WORK) or data.draw(st.booleans(), label='kept')]
    stretched = schedule.stretch(UNITS, kept, cycles)
    assert len(stretched) == len(kept)
    assert [r for rows in stretched for r in rows] == cycles
    issues = [r for r in kept if r in (SCALAR, WORK)]
    assert [rows[0] for rows in stretched if rows[0] in (SCALAR, WORK)] == issues


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(AssertionError, match='disagree'):
        schedule.stretch(UNITS, [SCALAR, WORK], [SCALAR, row(VLOAD=1)])
    with pytest.raises(AssertionError, match='length'):
        schedule.stretch(UNITS, [SCALAR, WORK], [SCALAR])
    with pytest.raises(AssertionError, match='15'):
        schedule.parse(BUNDLES, utilization(FINAL[1:]), utilization(CYCLES), 1)


@pytest.mark.parametrize(
    ('target', 'semantics', 'one_core'),
    [('v5e', 'parallel', False), ('v5p', 'parallel', False), ('v5p', 'arbitrary', True)],
)
def test_the_small_kernel(target, semantics, one_core):
    """small_kernel.py: a branch that clears, one with a loop of products, one that writes."""
    schedules = schedule.read(DUMPS / target, CHIPS[target].delay_slots)
    compiled = schedules[f'small_kernel_{semantics}.1']
    assert compiled.one_core is one_core
    clear, product, write = compiled.bodies
    assert [r.kind for r in compiled.bodies] == ['predicated', 'loop', 'predicated']
    # 128 × 128 × 128 multiply-adds, 16,384 a cycle.
    assert [r.busy['MXU'] for r in compiled.bodies] == [0, 128, 0]
    assert clear.busy['VSTORE'] == product.busy['VSTORE'] == write.busy['EUP'] == 16
    assert (clear.cycles, product.cycles) == (17, 193)
    assert clear.start < product.start < write.start
    dump = DUMPS / target / f'1-small_kernel_{semantics}.1-00-{schedule.FILES[2]}.txt'
    rows = dump.read_text().split('UTILIZATION:\n')[1].splitlines()
    assert compiled.code.total == len(rows)
    assert compiled.every_step + sum(r.cycles for r in compiled.bodies) == compiled.grid.total
    assert 'loop at' in str(compiled.code) and 'MXU 128' in str(compiled.code)


def test_a_name_compiled_again_replaces_the_first(tmp_path):
    for time, cycles in ((1, CYCLES), (2, FINAL)):
        texts = BUNDLES, utilization(FINAL), utilization(cycles)
        for part, text in zip(schedule.FILES, texts, strict=True):
            (tmp_path / f'{time}-fusion.3-0{time}-{part}.txt').write_text(text)
    (tmp_path / '1-half-00-final_bundles.txt').write_text(BUNDLES)
    (tmp_path / '1-fusion.3-00-schedule-analysis_final_bundles.txt').write_text('')
    (compiled,) = schedule.read(tmp_path, 1).values()
    assert compiled.code.total == len(FINAL)


@pytest.mark.slow
def test_the_dumps_are_what_the_compiler_makes(tmp_path):
    """Checks only that it can be read: another libtpu may schedule otherwise."""
    pytest.importorskip('libtpu')
    script = Path(__file__).with_name('small_kernel.py')
    command = [sys.executable, str(script), 'v6e', str(tmp_path)]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    schedules = schedule.read(tmp_path, CHIPS['v6e'].delay_slots)
    assert len(schedules) == 2, json.dumps(sorted(p.name for p in tmp_path.iterdir()))
    for compiled in schedules.values():
        (product,) = [region for region in compiled.bodies if region.busy['MXU']]
        assert product.kind == 'loop'
