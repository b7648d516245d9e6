"""Flags of the measurements, and the commands that the shipped configs open with."""

import dataclasses
import importlib
import importlib.resources
import json
import re
import shlex

import pytest
from refusals import refused

from helios_jax import cli, config, process
from helios_jax.config.run import POLICIES

NAMES = sorted(
    path.name.removesuffix('.py')
    for path in importlib.resources.files('helios_jax.configs').iterdir()
    if path.name.startswith('bench_')
)
MODULES = {name: importlib.import_module(f'helios_jax.configs.{name}') for name in NAMES}
COMMANDS = [
    (name, line)
    for name, module in MODULES.items()
    for line in (module.__doc__ or '').replace('\\\n', '').splitlines()
    if line.startswith('helios')
]


@pytest.fixture
def measured(monkeypatch):
    """Instead of processes: the configs that they would measure, and a row for each."""
    configs = []

    def run(_, values, *__, **___):
        configs.append(config.from_dict(values))
        return {'temp_gib': 31.5}

    monkeypatch.setattr(process, 'run', run)
    return configs


@pytest.mark.parametrize(('name', 'command'), COMMANDS)
def test_a_shipped_command_measures_its_own_config(name, command, measured, capsys):
    shipped = config.from_dict(MODULES[name].get_config())
    cli.main([*shlex.split(command)[1:], '--json'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(measured)
    if name == 'bench_memory':
        assert {cfg.memory.policy for cfg in measured} == set(POLICIES) - {'auto'}
        assert all(dataclasses.replace(c, memory=shipped.memory) == shipped for c in measured)
        return
    [cfg] = measured
    overridden = set(re.findall(r'--config\.(\w+)', command))
    for section in ('model', 'data', 'optimizer', 'train', 'mesh', 'memory'):
        assert (getattr(cfg, section) != getattr(shipped, section)) == (section in overridden)


@pytest.mark.parametrize('name', ['attention', 'memory', 'mesh', 'torch_peer', 'train'])
def test_help_of_a_measurement_has_no_hidden_flag(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(['bench', name, '--help'])
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert '--json' in printed and '--here' not in printed


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--target=v5', 'target=v5.*v5e, v5p'),
        ('--implementations=splash', 'implementations=splash.*jax_splash, tokamax'),
        ('--lengths=2k', 'lengths=2k.*number'),
        ('--earlier=/nowhere/at/all', 'earlier=/nowhere/at/all.*no such file'),
        ('--kv_heads=5', 'kv_heads=5 must divide'),
        ('--here={}', 'here'),
    ],
)
def test_bad_flags_are_one_line(flag, message, capsys):
    line = refused(capsys, 'bench', 'attention', flag, alone=True)
    assert re.search(message, line), line
