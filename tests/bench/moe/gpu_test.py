"""Benches of a GPU's mixtures of experts, on a CPU: their rows, not their times."""

import json

import pytest

from helios_jax.bench import timed
from helios_jax.bench.moe import passes, sublayer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sublayer, 'TOKENS', 64)
    monkeypatch.setattr(passes, 'TOKENS', 64)
    monkeypatch.setattr(timed, 'SECONDS', 0.001)


def test_a_sublayer_is_measured_beside_a_dense_one(capsys):
    sublayer.measure('small', num_rows=3 * 64, E=5, D=32, F=24)
    row = json.loads(capsys.readouterr().out)
    assert row['ratio'] > 0
    assert set(row['tflops']) == set(row['temp_gib']) == {'experts', 'dense'}


def test_passes_are_measured_beside_xlas(capsys):
    passes.measure('small', num_rows=3 * 64, D=32, F=24)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['what'] for row in rows] == ['take', 'swiglu']
    assert all(row['ratio'] > 0 for row in rows)
