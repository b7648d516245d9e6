"""What processes tell each other; two of them, over gloo."""

import json
import os
import socket
import subprocess
import sys

import pytest

from helios_jax.errors import UserError
from helios_jax.parallel import agreement

PROGRAM = """
import json, sys
from helios_jax.parallel import agreement, cluster
from helios_jax.errors import UserError
cluster.start()
mine = json.loads(sys.argv[1])
print(json.dumps([agreement.gather(mine), agreement.from_first(mine)]))
for _ in range(2):  # the processes go on together after an error that is caught
    try:
        with agreement.together() as facts:
            facts |= mine.get('facts', {})
            if 'user' in mine: raise UserError(mine['user'])
            if 'bug' in mine: raise KeyError(mine['bug'])
        print('same')
    except Exception as error:
        print(type(error).__name__, error)
"""


def run(*values: dict) -> list[list[str]]:
    """The lines that processes print which are given these values."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{listener.getsockname()[1]}'
    programs = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM, json.dumps(value)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1',
                'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(len(values)),
                'JAX_PROCESS_ID': str(index),
            },
        )
        for index, value in enumerate(values)
    ]  # fmt: skip
    try:
        outputs = [program.communicate(timeout=150)[0].splitlines() for program in programs]
        return [[line for line in lines if '[Gloo]' not in line] for lines in outputs]
    finally:
        for program in programs:
            program.kill()


def test_a_process_alone_agrees_with_itself():
    assert agreement.gather({'a': [1]}) == [{'a': [1]}] and agreement.from_first('x') == 'x'
    with agreement.together() as facts:
        facts['seed'] = 3
    with pytest.raises(UserError, match=r'^no such file$'), agreement.together():
        raise UserError('no such file')
    with pytest.raises(KeyError), agreement.together():
        raise KeyError('bug')


@pytest.mark.slow
def test_values_of_unequal_length_reach_every_process():
    long = {'text': 'ü' * 5000}
    lines = run({}, long)
    for own in lines:
        assert json.loads(own[0]) == [[{}, long], {}]
        assert own[1:] == ['same', 'same']


@pytest.mark.slow
@pytest.mark.parametrize('guilty', [0, 1])
def test_error_of_one_process_ends_all_with_its_message(guilty):
    values: list[dict] = [{}, {}]
    values[guilty] = {'user': 'text/*.txt: no such file'}
    lines = run(*values)
    assert lines[guilty][1:] == ['UserError text/*.txt: no such file'] * 2
    host = socket.gethostname()
    told = f'UserError process {guilty} on {host}: text/*.txt: no such file'
    assert lines[1 - guilty][1:] == [told] * 2
    values[guilty] = {'bug': 'x'}
    assert run(*values)[1 - guilty][1].endswith(f"on {host}: KeyError: 'x'")


@pytest.mark.slow
def test_facts_that_differ_are_named_with_process_and_host():
    shared = {'seed': 1, 'version of jax': '0.10'}
    lines = run({'facts': shared}, {'facts': shared | {'seed': 7, 'extra': 3}})
    for own in lines:
        assert own[1].startswith(f'UserError process 1 on {socket.gethostname()} differs from')
        assert 'extra is 3 and not None, seed is 7 and not 1;' in own[1]
        assert 'jax' not in own[1]
