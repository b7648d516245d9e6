"""A function in a process of its own: its result, its refusal, its crash, its noise."""

import math
import operator
import os
import signal

import pytest

from helios_jax import config, process
from helios_jax.errors import UserError


def test_a_result_comes_back_from_another_process():
    assert process.run(os.getpid) != os.getpid()
    # Apart from the nearest float32, and an order of arguments that matters.
    assert process.run(math.atan2, 0.1, -3) == math.atan2(0.1, -3)


def test_what_the_function_prints_is_not_its_result(capfd):
    assert process.run(print, 'loss 3.5') is None
    assert capfd.readouterr().out == ''


def test_a_refusal_passes_through_as_it_is(capfd):
    with pytest.raises(UserError) as expected:
        config.from_dict({'model': {'num_headz': 3}})
    with pytest.raises(UserError) as caught:
        process.run(config.from_dict, {'model': {'num_headz': 3}})
    assert str(caught.value) == str(expected.value)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('quiet', [False, True])
def test_a_crash_names_the_function_the_code_and_the_reason(quiet, capfd):
    with pytest.raises(UserError) as caught:
        process.run(operator.truediv, 7, 0, quiet=quiet)
    reason = 'ZeroDivisionError: division by zero'
    written = capfd.readouterr().err
    assert str(caught.value) == (
        f'_operator:truediv ended with code 1: {reason if quiet else "see above"}'
    )
    assert written.endswith(f'{reason}\n') if not quiet else written == ''


def test_a_process_that_is_killed_says_by_what():
    with pytest.raises(UserError, match='ended by SIGKILL: it wrote no reason'):
        process.run(signal.raise_signal, int(signal.SIGKILL), quiet=True)
