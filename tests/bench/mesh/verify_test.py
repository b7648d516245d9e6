"""Losses of meshes beside one device's, on simulated devices."""

import jax
import pytest

from helios_jax import config
from helios_jax.bench.mesh import verify

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.long
def test_two_devices_train_as_one_and_one_goes_on_with_what_they_saved(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 2)
    monkeypatch.setattr(verify.cluster, 'enable_compilation_cache', lambda _: None)
    few, *rows = verify.losses_of_meshes(['data_fsdp', 'context'])
    assert 'too few' in few['skipped']
    assert [row['mesh'] for row in rows] == ['context', 'half']
    assert all(row['equal'] and row['last_loss'] < row['first_loss'] for row in rows)
    assert any(row['worst_difference'] > 0 for row in rows)  # sums in another order


def test_a_loss_beyond_rounding_is_different():
    alone = [5.0, 4.5, 4.0]
    assert verify.row_of('data', [5.0, 4.5 * (1 + 1e-6), 4.0], alone)['equal']
    row = verify.row_of('data', [5.0, 4.5 * (1 + 1e-4), 4.0], alone)
    assert not row['equal'] and 'DIFFERENT' in verify.describe(row)


def test_the_model_has_two_rows_for_each_device():
    cfg = verify.small(True, config.Mesh(fsdp=1, expert=-1), 3)
    assert cfg.train.batch_rows == 6 and cfg.model.compute_dtype == 'float32'
