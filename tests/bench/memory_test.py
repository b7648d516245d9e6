"""The bench of memory policies on a model of seconds: its figures mean what they say."""

import dataclasses
import subprocess

import jax
import numpy as np
import pytest
import small_run

from helios_jax import config
from helios_jax.bench import memory


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp('memory')
    cfg = dataclasses.replace(small_run.make_config(root), mesh=config.Mesh(fsdp=8))
    measured = {}
    for policy in ('minimal', 'fp8', 'full'):
        made = dataclasses.replace(cfg, memory=config.Memory(policy))
        measured[policy] = memory.measure(made, root / 'gradients')
    return measured


@pytest.mark.slow
def test_policies_differ_in_what_they_save_and_not_in_the_loss(rows):
    assert len({row['loss_bits'] for row in rows.values()}) == 1
    assert np.isfinite(rows['full']['loss'])
    saved = [rows[policy]['saved_gib'] for policy in ('full', 'fp8', 'minimal')]
    assert saved == sorted(saved) and saved[0] > 0
    for row in rows.values():
        assert row['saved_gib'] * memory.GIB == pytest.approx(
            memory.GIB * sum(gib for _, gib in row['saved'].values())
        )
        assert row['temp_gib'] > 0 and row['step_ms'] >= row['fastest_ms'] > 0
        assert (row['device'], row['jax']) == (jax.devices()[0].device_kind, jax.__version__)


@pytest.mark.slow
def test_cosines_are_with_the_first_policy(rows):
    assert 'least_cosine' not in rows['minimal']
    assert rows['full']['least_cosine'] == pytest.approx(1, abs=1e-5)
    assert 0.98 < rows['fp8']['least_cosine'] < 1 - 1e-5


def test_the_least_cosine_names_its_parameter(tmp_path):
    one, other = np.array([3.0, 4.0]), np.array([4.0, 3.0])
    memory.write({'a': one, 'b': one, 'none': np.zeros(3)}, tmp_path / 'gradients')
    found = memory.cosines(
        {'a': jax.numpy.asarray(2 * one), 'b': jax.numpy.asarray(other), 'none': jax.numpy.ones(3)},
        tmp_path / 'gradients',
    )
    assert found == {'least_cosine': pytest.approx(24 / 25), 'of_parameter': 'b'}


def test_a_policy_that_does_not_run_is_a_line_that_says_so():
    line = memory.text({'policy': 'none', 'temp_gib': 126.4, 'failed': 'out of memory'})
    assert 'none' in line and '126.40' in line and line.endswith('failed: out of memory')


def test_a_policy_may_name_actions_and_parts(monkeypatch, capsys):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, '', 'out of memory\n')

    monkeypatch.setattr(subprocess, 'run', run)
    memory.compare(['--config=tiny'], ['full:backward_parts=4:block_input=fp8'], as_json=True)
    assert commands[0][-4] == '--config.memory.policy=full'
    assert commands[0][-2:] == [
        '--config.memory.backward_parts=4', '--config.memory.actions.block_input=fp8',
    ]  # fmt: skip
    assert 'out of memory' in capsys.readouterr().out
