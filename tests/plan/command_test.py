"""helios plan on the command line: what it prints, how fast, and what it refuses."""

import dataclasses
import json
import pkgutil
import subprocess
import sys

import pytest
from refusals import refused

from helios_jax import cli, config, configs
from helios_jax.data import tokenizer
from helios_jax.plan import command
from helios_jax.plan.changes import PRESETS

CONFIGS = [found.name for found in pkgutil.iter_modules(configs.__path__) if not found.ispkg]


def run(capsys, *argv: str) -> str:
    cli.main(['plan', *argv])
    return capsys.readouterr().out


@pytest.mark.parametrize('name', CONFIGS)
def test_every_shipped_config_has_a_plan_without_jax(name):
    # Half a second of a fresh process's time, where importing jax alone takes longer.
    code = (
        'import sys; from helios_jax import cli; '
        f'cli.main(["plan", "--config={name}", "--topology=v5p:4x4x2", '
        '"--config.train.batch_rows=128", "--json"]); '
        'print("jax" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plan, last = done.stdout.strip().splitlines()
    assert last == 'False'
    found = json.loads(plan)
    assert found['num_devices'] == 32
    assert found['peak_bytes'] == found['arguments_bytes'] + found['temporary_bytes']
    assert found['fits'] == (found['peak_bytes'] <= found['available_bytes'])


def test_the_text_names_what_is_large_and_what_binds(capsys):
    out = run(capsys, '--config=helios_8b', '--topology=v5p:2x2x4')
    for part in ('parameters, float32', 'saved block_input, bfloat16', 'peak (backward)', 'MFU'):
        assert part in out
    assert 'bound by                 compute' in out


@pytest.mark.slow
def test_what_does_not_fit_comes_with_changes_that_do(capsys):
    arguments = ('--config=helios_8b', '--topology=v5e:4x4', '--batch=96')
    assert 'DOES NOT FIT' in run(capsys, *arguments)
    found = json.loads(run(capsys, *arguments, '--json'))
    assert not found['fits']
    assert len(found['changes']) == 3
    overrides = found['changes'][0]['overrides']
    assert json.loads(run(capsys, *arguments, *overrides, '--json'))['fits']


def test_a_search_ranks_by_tokens_per_second():
    """In a process of its own, where no argument's type is checked: that takes half a minute."""
    arguments = ('--config=helios_8b', '--topology=v5p:2x2x1', '--search', '--json')
    command = [sys.executable, '-m', 'helios_jax', 'plan', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(done.stdout)['search']
    speeds = [row['tokens_per_second'] for row in found]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--topology=v5q:2x2', "Did you mean 'v5"),
        ('--topology=v5p:2xx', 'must be numbers joined by x'),
        ('--topology=v5e:2x2x2', 'must have 2 dimensions'),
        ('--batch=7', 'batch_rows=7'),
        ('--config.mesh.tensor=3', 'does not fit 8 devices'),
    ],
)
def test_what_makes_no_plan_is_refused_in_one_line(argument, message, capsys):
    arguments = ('plan', '--config=helios_8b', '--topology=h100:8', argument)
    assert message in refused(capsys, *arguments, alone=True)


def test_auto_is_resolved_for_the_topology(capsys):
    found = json.loads(run(capsys, '--config=helios_1b', '--config.memory.policy=auto', '--json'))
    assert found['policy'] in ('minimal', 'fp8')
    assert found['fits']


def test_the_vocabulary_is_the_tokenizers():
    assert tokenizer.load('bytes').vocab_size == command.BYTE_VOCABULARY


def test_auto_is_resolved_for_the_devices_at_hand(capsys):
    small = config.Config(model=config.Model(vocab_size=256), memory=config.Memory('auto'))
    resolved = command.with_policy(small)
    assert resolved == dataclasses.replace(small, memory=resolved.memory)
    assert resolved.memory.policy in PRESETS
    assert f'memory.policy=auto: {resolved.memory.policy}' in capsys.readouterr().out
    assert command.with_policy(resolved) is resolved
