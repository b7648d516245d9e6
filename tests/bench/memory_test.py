"""The bench of memory policies on a model of seconds: its figures mean what they say."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_run

from helios_jax import config, process
from helios_jax.bench import memory
from helios_jax.errors import UserError


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp('memory')
    cfg = dataclasses.replace(small_run.make_config(root), mesh=config.Mesh(fsdp=8))
    measured = {}
    for policy in ('minimal', 'fp8', 'full'):
        made = dataclasses.replace(cfg, memory=config.Memory(policy))
        measured[policy] = memory.measure_policy(dataclasses.asdict(made), str(root))
    return measured


@pytest.mark.long
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


@pytest.mark.long
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
    line = memory.describe({'policy': 'none', 'temp_gib': 126.4, 'failed': 'out of memory'})
    assert line == f'{"none":24} temp 126.40  failed: out of memory'


def test_a_policy_may_name_actions_and_parts():
    cfg = config.Config(memory=config.Memory('fp8', optimizer='host'))
    made = memory.with_policy(cfg, 'full:backward_parts=4:block_input=fp8')
    actions = dataclasses.replace(cfg.memory.actions, block_input='fp8')
    assert made.memory == config.Memory('full', actions=actions, backward_parts=4, optimizer='host')
    assert dataclasses.replace(made, memory=cfg.memory) == cfg


@pytest.mark.parametrize(
    ('policy', 'message'),
    [
        ('fulll', "'fulll'"),
        ('full:block_inputs=fp8', "block_inputs.*Did you mean 'block_input'"),
        ('full:block_input=fp9', 'fp9'),
        ('full:backward_parts=four', 'backward_parts=four.*whole number'),
    ],
)
def test_a_policy_that_is_none_is_refused_before_anything_runs(policy, message, monkeypatch):
    ran = []
    monkeypatch.setattr(process, 'run', lambda *call, **_: ran.append(call))
    with pytest.raises(UserError, match=message):
        memory.compare_policies(config.Config(), ['minimal', policy], as_json=True)
    assert not ran


def test_policies_share_a_directory_and_one_that_fails_does_not_end_the_others(monkeypatch, capsys):
    directories = set()

    def run(function, values, directory, quiet):
        directories.add(directory)
        policy = config.from_dict(values).memory.policy
        if policy == 'none':
            raise UserError('measure_policy ended by SIGKILL: ' + 300 * 'x')
        return {'temp_gib': 31.5}

    monkeypatch.setattr(process, 'run', run)
    memory.compare_policies(config.Config(), ['minimal', 'none', 'fp8'], as_json=True)
    minimal, none, fp8 = map(json.loads, capsys.readouterr().out.splitlines())
    assert minimal == {'policy': 'minimal', 'temp_gib': 31.5}
    assert none['failed'].startswith('measure_policy ended by SIGKILL') and len(none) == 2
    assert fp8['policy'] == 'fp8' and len(directories) == 1
