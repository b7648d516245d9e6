"""The attention bench, but for the compiler: problems, peers' plans, programs, what is printed."""

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import cli
from helios_jax.bench import (
    attention,
    attention_peers,
    attention_problem,
    attention_task,
    attention_tokamax,
    tpu_program,
)
from helios_jax.bench.attention_problem import PASSES, Problem
from helios_jax.bench.tpu_timing import CHIPS
from helios_jax.errors import UserError

SMALL = {'heads': 6, 'kv_heads': 2, 'head_dim': 128}
PROBLEMS = [
    Problem(4096, **SMALL),
    Problem(4096, **SMALL, batch=2, window=1500),
    Problem(4096, **SMALL, batch=3, documents=9),
    Problem(2048, **SMALL, documents=2),
]


def visible(problem: Problem) -> np.ndarray:
    """[B T T]"""
    at = np.arange(problem.length)
    ids = problem.segment_ids
    seen = (ids[:, :, None] == ids[:, None]) & (at[:, None] >= at)
    return seen & (at[:, None] - at < (problem.window or problem.length))


def blocks(seen: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of [T T], which blocks have any and which have all."""
    cut = seen.reshape(len(seen) // size, size, -1, size)
    return cut.any((1, 3)), cut.all((1, 3))


@pytest.mark.parametrize('problem', PROBLEMS, ids=str)
def test_a_problem_counts_what_its_mask_leaves(problem):
    ids, positions = problem.segment_ids, problem.positions
    assert ids.shape == positions.shape == (problem.batch, problem.length)
    assert all(np.unique(row).tolist() == [*range(1, problem.documents + 1)] for row in ids)
    assert np.all(np.diff(ids) >= 0)
    starts = np.diff(ids, prepend=0, axis=1) > 0
    np.testing.assert_array_equal(positions == 0, starts)
    assert np.all((np.diff(positions) == 1) | starts[:, 1:])
    pairs = int(visible(problem).sum())
    assert problem.flops('forward') == 2 * 2 * 6 * 128 * pairs
    assert problem.flops('backward') == 2.5 * problem.flops('forward')


def test_a_problem_that_cannot_be_is_refused():
    with pytest.raises(UserError, match='kv_heads=3 must divide --heads=8'):
        Problem(128, heads=8, kv_heads=3)
    with pytest.raises(UserError, match=r'documents=129.*128'):
        Problem(128, documents=129)


def total(plan, name: str) -> float:
    return sum(step.number * step.runs[name] for step in plan.steps)


@pytest.fixture
def tokamax():
    """Its module of ours; tokamax adds arrays of different ranks."""
    if reason := attention_tokamax.missing():
        pytest.skip(reason)
    with jax.numpy_rank_promotion('allow'):
        yield attention_tokamax


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('problem', PROBLEMS, ids=str)
def test_jax_splash_runs_each_block_below_the_diagonal(problem, fused):
    """It skips by the mask alone: segments change nothing."""
    options = {'block': 512, 'compute': 512, 'fused': fused}
    plans = attention_peers.setup(problem, options).plans
    whole = dataclasses.replace(problem, documents=1)
    some, _ = blocks(visible(whole)[0], 512)
    assert {name.split('_')[2] for name in plans} == {'fwd', 'dkv', *([] if fused else ['dq'])}
    heads = problem.batch * problem.heads
    for name, plan in plans.items():
        assert ('segmented' in name) == (problem.documents > 1)
        assert total(plan, 'run') == heads * some.sum()
        steps = sum(step.number for step in plan.steps)
        assert heads * some.sum() <= steps <= heads * some.size
        rows = problem.batch * problem.kv_heads if 'dkv' in name else heads
        assert total(plan, 'init') == total(plan, 'finish') == rows * len(some)


@pytest.mark.parametrize('problem', PROBLEMS, ids=str)
def test_tokamax_leaves_out_what_segments_leave_out(problem, tokamax):
    options = {'block': 512, 'compute': 512, 'diagonal_skip': False}
    forward, backward = tokamax.setup(problem, options | {'dynamic': True}).plans.values()
    # A batch shares one list of steps.
    some, _ = blocks(visible(problem).any(0), 512)
    _, every = blocks(visible(dataclasses.replace(problem, documents=1))[0], 512)
    heads = problem.batch * problem.heads
    for plan in (forward, backward):
        assert total(plan, 'full') == heads * (some & every).sum()
        assert total(plan, 'masked') == heads * (some & ~every).sum()
        assert sum(step.number for step in plan.steps) == heads * some.sum()
    assert total(forward, 'init') == total(forward, 'finish') == heads * len(some)
    writes = total(backward, 'write') + total(backward, 'add')
    assert writes == total(backward, 'init') == heads * len(some)
    assert total(backward, 'add') == 2 * total(backward, 'write')


def test_tokamax_steps_over_all_blocks_where_its_grid_is_static(tokamax):
    problem, options = PROBLEMS[0], {'block': 512, 'compute': 512, 'diagonal_skip': False}
    plan = tokamax.setup(problem, options | {'dynamic': False}).plans['splash_mha_dkv']
    assert sum(step.number for step in plan.steps) == 6 * 8 * 8
    assert (total(plan, 'full'), total(plan, 'masked')) == (6 * 28, 6 * 8)
    assert total(plan, 'write') == total(plan, 'init') == 2 * 8


def test_bytes_are_those_of_blocks_that_change():
    index = np.array([0, 0, 1, 1, 0])
    assert attention_peers.changes(index).tolist() == [1, 0, 1, 0, 1]
    assert attention_peers.changes(index, np.array([0, 1, 1, 1, 1])).tolist() == [1, 1, 1, 0, 1]
    runs = {'a': np.array([True, False, True]), 'b': np.array([2, 0, 2])}
    plan = attention_peers.plan(runs, np.array([7, 5, 7]), batch=4)
    assert plan.bodies == ('a', 'b')
    assert [(s.number, s.runs, s.hbm_bytes) for s in plan.steps] == [
        (4, {'a': 0, 'b': 0}, 5),
        (8, {'a': 1, 'b': 2}, 7),
    ]
    # The forward pass reads and writes each block of queries once, and each key block when due.
    problem = Problem(4096, heads=4, kv_heads=4)
    options = {'block': 1024, 'compute': 512}
    plan = attention_peers.setup(problem, options).plans['splash_mha_fwd']
    once = 2 * 4096 * 128 * 2 + 2 * 4096 * 128 * 4  # q, out; positions, log-sum-exp
    # Blocks below the diagonal, but that the second row begins with the one of the first. A skipped
    # step fetches what the next row begins with.
    pairs = 1 + 2 + 3 + 4 - 1
    assert sum(s.number * s.hbm_bytes for s in plan.steps) == 4 * (once + 2 * pairs * 1024 * 256)


@pytest.mark.parametrize('alone', [False, True])
@pytest.mark.parametrize('name', ['nothing', 'jax_splash', 'tokamax'])
def test_programs_have_the_layers_results(name, alone, request):
    if name == 'tokamax':
        request.getfixturevalue('tokamax')
    problem = Problem(1024, batch=2, heads=4, kv_heads=2, documents=2)
    implementation = attention_task.IMPLEMENTATIONS[name]
    for which in PASSES:
        options = implementation.variants(problem, which, 'v5e')[0]
        setup = implementation.setup(problem, options)
        function, arguments = attention_problem.program(problem, setup, which, alone=alone)
        results = jax.eval_shape(function, *arguments)
        if which == 'forward':
            out = results[0]
            shapes = jax.tree.map(lambda x: x.shape, arguments[0])
            width = (2, 4, 1024, 128) if alone else (2, 1024, 512)
            assert (out.shape, out.dtype) == (width, jnp.bfloat16)
        else:
            assert jax.tree.map(lambda x: x.shape, results) == shapes


def test_variants_fit_the_problem():
    for problem in (*PROBLEMS, Problem(1536), Problem(16384), Problem(1000)):
        for name in ('jax_splash', 'tokamax'):
            for which in PASSES:
                found = attention_task.IMPLEMENTATIONS[name].variants(problem, which, 'v5e')
                assert all(problem.length % options['block'] == 0 for options in found)
                assert bool(found) == (problem.length != 1000)
                assert len({json.dumps(options) for options in found}) == len(found) <= 6


def test_a_program_is_read_with_its_loops_and_twins():
    from bench.tpu_schedule_test import CYCLES, by_hand

    chip = CHIPS['v5e']
    hlo = (Path(__file__).parent / 'dumps' / 'program.txt').read_text()
    operations = {o.name: o for o in tpu_program.read(hlo, {'fusion.1': by_hand()}, chip)}
    assert list(operations) == ['fusion.1', 'fusion.2', 'copy-start', 'kernel.2']
    kernel = operations['kernel.2']
    assert (kernel.kernel, kernel.times, kernel.vmem_bytes) == (True, 5, 4096)
    # 20 turns of the loop, but for two bundles outside it; fusion.2 is compiled like fusion.1.
    cycles = 2 + 20 * (len(CYCLES) - 2)
    assert operations['fusion.1'].seconds == operations['fusion.2'].seconds == cycles / chip.clock
    tile = 16 * 128 * 4
    assert operations['fusion.1'].hbm_bytes == 3 * 8 * 128 * 2  # padded; the result is in VMEM
    assert operations['fusion.2'].hbm_bytes == 3 * 8 * 128 * 2 + tile
    assert operations['copy-start'].seconds == 0 and operations['copy-start'].hbm_bytes > tile
    program = tpu_program.Program(list(operations.values()), {}, 0)
    assert program.kernels == [kernel]
    assert program.seconds == pytest.approx(2 * cycles / chip.clock)


def made(task: attention_task.Task, kernel_ms: float, others_ms: float) -> dict:
    kernel = {'name': 'splash', 'grid_steps': 320.0, 'every_step': 9, 'bodies': {'full': 5130},
              'spills': 5, 'num_cores': 1, 'cycles': 1e6, 'waiting': 1e5, 'mxu_share': 0.68,
              'hbm_mib': 400.0, 'vmem_mib': 8.0}  # fmt: skip
    kernels = [] if task.implementation == 'nothing' else [kernel]
    return {**task._asdict(), 'kernels': kernels, 'kernel_ms': kernel_ms, 'others_ms': others_ms,
            'hbm_mib': 500.0 + 100 * others_ms}  # fmt: skip


@pytest.fixture
def compilations(monkeypatch) -> list[attention_task.Task]:
    """Instead of the compiler: the larger the block, the faster; 2048 does not fit."""
    tasks = []

    def run(batch, jobs):
        for task in batch:
            tasks.append(task)
            block = task.options.get('block', 0)
            if block == 2048:
                yield {**task._asdict(), 'refused': 'RESOURCE_EXHAUSTED: vmem'}
            else:
                yield made(task, 2048 / block if block else 0.0, 1.0 if block else 0.75)

    monkeypatch.setattr(attention, 'run', run)
    return tasks


def test_the_fastest_variant_is_measured_in_the_layer(compilations, capsys, tmp_path):
    arguments = ['bench', 'attention', '--target=v5p', '--lengths=16384',
                 '--implementations=jax_splash']  # fmt: skip
    cli.main([*arguments, '--json'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['which'] for row in rows] == list(PASSES)
    for row in rows:
        assert row['options']['block'] == 1024 and not row['alone']
        assert row['around_ms'] == 0.25 and row['total_ms'] == 2.25
        assert row['total_hbm_mib'] == 25
    # Both passes of the layer around nothing, and of it around the fastest.
    assert len([task for task in compilations if not task.alone]) == 4
    flops = Problem(16384).flops('forward')
    assert rows[0]['tflops'] == pytest.approx(flops / 2.25e-3 / 1e12)

    cli.main(arguments)
    printed = capsys.readouterr()
    assert 'refused, RESOURCE_EXHAUSTED' in printed.err
    assert '2.000 ms kernel +   0.250 around =     2.250 ms' in printed.out
    assert 'splash: 320 steps of 9 cycles + full 5130; 1 core(s)' in printed.out

    # Ours against them, without compiling them again.
    earlier = tmp_path / 'rows.json'
    earlier.write_text('\n'.join(map(json.dumps, rows)))
    ours = attention_task.Implementation(
        lambda problem, which, target: [{'block': 1536}], lambda problem, options: None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.IMPLEMENTATIONS, attention.OURS, ours)
        compilations.clear()
        cli.main([*arguments[:-1], f'--implementations={attention.OURS}', f'--earlier={earlier}'])
    assert {task.implementation for task in compilations} == {attention.OURS}
    assert len(compilations) == 4
    printed = capsys.readouterr().out
    ratio = 2.25 / (2048 / 1536 + 0.25)
    for which in PASSES:
        assert f'{which}: best peer ÷ helios = {ratio:.2f}' in printed


def test_tokamaxs_own_measurement_stands_beside_the_prediction(compilations, capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.0.17')
    arguments = ['bench', 'attention', '--target=v6e', '--implementations=tokamax']
    cli.main([*arguments, '--lengths=4096'])
    assert 'its authors measured 137 TFLOP/s' in capsys.readouterr().out
    cli.main([*arguments, '--lengths=4096', '--documents=4'])
    assert 'its authors' not in capsys.readouterr().out
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.0.12')
    cli.main([*arguments, '--lengths=4096'])
    assert re.search(r"0\.0\.17.*0\.0\.12.*'helios_jax\[bench\]'", capsys.readouterr().err)


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--target=v5', 'target=v5.*v5e, v5p'),
        ('--implementations=splash', 'implementations=splash.*jax_splash, tokamax'),
        ('--lengths=2k', 'lengths=2k.*number'),
        ('--earlier=/nowhere/at/all', 'earlier=/nowhere/at/all.*no such file'),
        ('--kv_heads=5', 'kv_heads=5 must divide'),
    ],
)
def test_bad_flags_are_one_line(flag, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(['bench', 'attention', flag])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
