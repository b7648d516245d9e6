"""The bench of attention, without the compiler: what is chosen, and what is printed."""

import importlib.metadata
import json
import re

import pytest
from attention_shapes import PROBLEMS

from helios_jax import cli
from helios_jax.bench.attention import compare, task
from helios_jax.bench.attention.problem import PASSES, Problem


def test_variants_fit_the_problem():
    for problem in (*PROBLEMS, Problem(1536), Problem(16384), Problem(1000)):
        for name in ('jax_splash', 'tokamax'):
            for which in PASSES:
                found = task.IMPLEMENTATIONS[name].variants(problem, which, 'v5e')
                assert all(problem.length % options['block'] == 0 for options in found)
                assert bool(found) == (problem.length != 1000)
                assert len({json.dumps(options) for options in found}) == len(found) <= 6


def made(of: task.Task, kernel_ms: float, others_ms: float) -> dict:
    kernel = {'name': 'splash', 'grid_steps': 320.0, 'every_step': 9, 'bodies': {'full': 5130},
              'spills': 5, 'num_cores': 1, 'cycles': 1e6, 'waiting': 1e5, 'mxu_share': 0.68,
              'hbm_mib': 400.0, 'vmem_mib': 8.0}  # fmt: skip
    kernels = [] if of.implementation == 'nothing' else [kernel]
    return {**of._asdict(), 'kernels': kernels, 'kernel_ms': kernel_ms, 'others_ms': others_ms,
            'hbm_mib': 500.0 + 100 * others_ms}  # fmt: skip


@pytest.fixture
def compilations(monkeypatch) -> list[task.Task]:
    """Instead of the compiler: the larger the block, the faster; 2048 does not fit."""
    tasks = []

    def run(batch, jobs):
        for one in batch:
            tasks.append(one)
            block = one.options.get('block', 0)
            if block == 2048:
                yield {**one._asdict(), 'refused': 'RESOURCE_EXHAUSTED: vmem'}
            else:
                yield made(one, 2048 / block if block else 0.0, 1.0 if block else 0.75)

    monkeypatch.setattr(compare, 'run', run)
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
    assert len([one for one in compilations if not one.alone]) == 4
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
    ours = task.Candidates(
        lambda problem, which, target: [{'block': 1536}], lambda problem, options: None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.IMPLEMENTATIONS, compare.OURS, ours)
        compilations.clear()
        cli.main([*arguments[:-1], f'--implementations={compare.OURS}', f'--earlier={earlier}'])
    assert {one.implementation for one in compilations} == {compare.OURS}
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
