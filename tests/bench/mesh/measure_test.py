"""A measured step on simulated devices: what is counted, and that a mesh trains."""

import dataclasses

import jax
import numpy as np
import pytest

from helios_jax import config
from helios_jax.bench.mesh import cases, measure
from helios_jax.bench.trace import Event

pytestmark = pytest.mark.usefixtures('quick_compilation')


def small(mesh: config.Mesh) -> config.Config:
    return config.replace(
        cases.settings('tiny', 'residual', 48),
        {
            'model.num_layers': 1,
            'train.batch_rows': 6,
            'train.compilation_cache': '',
            'mesh': mesh,
        },
    )


def test_rows_are_whole_documents_of_the_vocabulary():
    batch = measure.random_rows(small(config.Mesh()))
    assert batch.tokens.shape == (6, 48) and batch.tokens.max() < 256
    assert (batch.segment_ids == 1).all() and batch.loss_mask.all()
    np.testing.assert_array_equal(batch.positions[3], np.arange(48))


@pytest.mark.slow
def test_a_step_is_measured_on_some_of_the_devices(monkeypatch):
    monkeypatch.setattr(measure, 'SECONDS', 0.1)
    row = measure.measure_step(dataclasses.asdict(small(config.Mesh(fsdp=2))), 2)
    tokens = row['card_tokens_per_second'] * row['step_ms'] / 1e3
    assert tokens == pytest.approx(6 * 48 / 2)
    assert measure.LEAST <= row['steps'] <= measure.MOST
    assert 0 < row['loss'] < 7
    assert np.isnan(row['mfu']) and 'kernel_ms' not in row  # a CPU's


def test_a_cards_time_is_the_mean_over_the_cards(monkeypatch, tmp_path):
    ms = 1e6
    one = [Event('nvjet_a', 0.0, 6 * ms), Event('ncclDevKernel_AllGather_RING', 4 * ms, 10 * ms)]
    other = [Event('nvjet_a', 0.0, 2 * ms), Event('loop_fusion', 3 * ms, 4 * ms)]
    monkeypatch.setattr(measure.trace, 'card_events', lambda _: [one, other, []])
    found = measure.time_of_a_card(tmp_path)
    each = 1 / measure.PROFILED_STEPS / 2
    assert found['kernel_ms'] == pytest.approx(
        {'matmul': 8 * each, 'collective': 6 * each, 'fusion': each}
    )
    assert found['collective_ms'] == {
        'all_gather': pytest.approx({'all': 6 * each, 'exposed': 4 * each})
    }
    assert found['exposed_ms'] == pytest.approx(4 * each)
    assert found['idle_ms'] == pytest.approx(each)
    assert found['profiled_ms'] == pytest.approx(14 * each)


def test_devices_are_named():
    assert measure.device_facts() == {'kind': 'cpu', 'count': jax.device_count()}
