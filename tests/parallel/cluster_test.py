import os
import signal

import jax
import pytest

from helios_jax.errors import UserError
from helios_jax.parallel import cluster


def test_a_signal_asks_once_and_a_second_one_ends_the_process_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with cluster.stop_on_signals() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), cluster.stop_on_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize('missing', ['JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'])
def test_a_coordinator_without_its_numbers_is_refused(missing, monkeypatch):
    variables = {
        'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0',
        'JAX_PLATFORMS': 'cuda',
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(missing, 'two')
    with pytest.raises(UserError, match=f"{missing}='two' must be a number"):
        cluster.start()


def test_one_process_needs_no_cluster(monkeypatch):
    monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    cluster.start()
    assert jax.process_count() == 1
