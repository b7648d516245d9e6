"""A fact has one home: an invented one, written into its row alone, is followed by all who read it.

The rows are edited in a copy of the package, which a process of its own then imports.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import helios_jax

# file, a pattern that its row alone matches, the invented fact
EDITS = [
    ('chips.py', r'197e12, 15\.75 \* GIB, 819e9', '203e12, 7.75 * GIB, 611e9'),
    ('chips.py', r"'TPU v5 lite', 'TPU v5e'", "'TPU v5 lite', 'TPU v5 mini'"),
    (
        'chips.py',
        r"(topology='v5e:2x2'[^)]*)kernel_vmem_bytes=100 \* MIB, delay_slots=4",
        r'\1kernel_vmem_bytes=80 * MIB, delay_slots=3',
    ),
    ('arch/weights.py', r"('up\.w', \(D, F\)), \('embed', 'mlp'\)", r"\1, ('stream', 'gate')"),
    ('arch/weights.py', r"NORM: Axes = \('norm',\)", "NORM: Axes = ('gate_embed',)"),
    ('arch/rules.py', r"'vocab': \('tensor',\)", "'vocab': ('data',)"),
    (
        'config/run.py',
        r'    final_hidden: str',
        "    invented: str = _tensor('batch length mlp', 'float32')  # an invention\n"
        '    final_hidden: str',
    ),
    ('config/run.py', r"(dispatched: str = _tensor\('batch length) stream", r'\1 gate'),
    ('arch/buffers.py', r'CUDNN_SEGMENTS = 8', 'CUDNN_SEGMENTS = 5'),
    ('plan/measured.py', r'(\nSTREAMS = Measured\(\s*)6', r'\g<1>11'),
]
READERS = Path(__file__).with_name('readers.py')

pytestmark = pytest.mark.slow


def read(tree: Path) -> dict[str, Any]:
    environment = os.environ | {'PYTHONPATH': str(tree), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [sys.executable, str(READERS)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def facts(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the readers find in the package as it is, and with the invented facts."""
    tree = tmp_path_factory.mktemp('tree')
    copy = tree / 'helios_jax'
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(Path(helios_jax.__file__).parent, copy, ignore=ignored)
    before = read(tree)
    for name, row, invented in EDITS:
        text, count = re.subn(row, invented, (copy / name).read_text())
        assert count == 1, f'{count} homes of {row} in {name}'
        (copy / name).write_text(text)
    return before, read(tree)


def test_a_chips_figures_reach_plan_mfu_kernels_and_bench(facts):
    before, after = facts
    assert (before['plan_available'], after['plan_available']) == (15.75 * 2**30, 7.75 * 2**30)
    assert (before['mfu_peak'], after['mfu_peak']) == (197e12, 203e12)
    assert after['plan_compute'] < before['plan_compute']
    assert after['plan_memory'] > before['plan_memory']
    assert (before['kinds'], after['kinds']) == ([True, False], [False, True])
    assert after['bench_clock'] / before['bench_clock'] == pytest.approx(203 / 197)
    assert (before['bench_delay_slots'], after['bench_delay_slots']) == (4, 3)
    assert (before['kernel_vmem'], after['kernel_vmem']) == (100, 80)


def test_a_weights_axes_and_shape_reach_model_sharding_optimizer_and_plan(facts):
    before, after = facts
    assert before['sharding_up'] == [None, 'fsdp', 'tensor']
    assert after['sharding_up'] == [None, None, None]
    assert (before['optimizer_up'], after['optimizer_up']) == (['muon', True], ['adamw', False])
    assert after['dry_run_up'] == [['layers,', 'stream,', 'gate']]
    assert before['sharding_q_norm'] == [None, None]
    assert after['sharding_q_norm'] == [None, 'fsdp']
    for found in facts:
        assert found['counted'] == found['model_parameters']
    # On each of four devices: in three layers a matrix whole instead of a quarter, now with a
    # second moment; all norms in two; the embedding in two instead of in four.
    up, norms, embed = 3 * 48 * 56, 3 * (4 * 48 + 2 * 32) + 48, 512 * 48
    more = up - up // 4 + embed // 2 - embed // 4 - norms // 2
    assert after['plan_parameters'] - before['plan_parameters'] == 4 * more
    assert after['plan_moments'] - before['plan_moments'] == 4 * (2 * more + up // 4)


def test_the_mesh_axes_of_a_logical_one_reach_sharding_and_its_table(facts):
    before, after = facts
    assert before['sharding_embed'] == ['tensor', 'fsdp']
    assert after['sharding_embed'] == ['data', 'fsdp']
    assert before['sharding_table'][0].split() == ['vocab', '→', 'tensor']
    assert after['sharding_table'][0].split() == ['vocab', '→', 'data']


def test_a_tensor_is_a_setting_an_action_a_shape_and_a_rule_at_once(facts):
    before, after = facts
    assert (before['policy'], after['policy']) == (None, 'remat')
    assert (before['setting'], after['setting']) == ([], ['invented'])
    assert after['comment'] == ["''", 'an invention']
    assert 'unexpected keyword' in before['refused']
    assert 'would round it' in after['refused']
    assert (before['shape'], after['shape']) == ([8, 64, 48], [8, 64, 16])


def test_buffers_and_figures_that_were_read_off_reach_kernels_and_plan(facts):
    before, after = facts
    assert (before['plan_cudnn'], before['kernel_cudnn']) == (8, 8)
    assert (after['plan_cudnn'], after['kernel_cudnn']) == (5, 5)
    assert after['plan_working'] > before['plan_working']
    assert (before['plan_ages'], after['plan_ages']) == (['6'], ['11'])
