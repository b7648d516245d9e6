"""What an import costs: its time beside its bytes', and how much of a model is in memory."""

import pytest
from refusals import refused

from helios_jax import config, restoring
from helios_jax.bench import convert

# 12 stacked layers, of which one is a fiftieth of the model.
MODEL = config.Config(model=config.Model(
    vocab_size=5000, num_layers=12, embed_dim=512, num_heads=8, num_kv_heads=4, head_dim=64,
    mlp_dim=1536,
))  # fmt: skip


@pytest.mark.slow
def test_an_import_or_a_load_holds_no_more_than_a_few_tensors(tmp_path, monkeypatch):
    # Or the allocator keeps what was given back, some 70 MB whatever the model's size.
    for name in ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'):
        monkeypatch.setenv(name, '65536')
    row = convert.measured(MODEL, 'float32', tmp_path, repeats=1)
    assert row['bytes'] > 9 * row['largest_tensor_bytes']
    # One tensor, and what of another is on its way to the disk.
    assert row['import_peak_bytes'] < 2 * row['largest_tensor_bytes']
    assert row['load_peak_bytes'] < row['bytes'] / 2  # compilers' memory is as large as a tensor
    assert row['import_seconds'] > row['read_seconds'] > 0
    assert restoring.restore(tmp_path / 'run0').config.model.num_layers == 12


def test_what_cannot_be_measured_is_refused(capsys, tmp_path):
    line = refused(capsys, 'bench', 'convert', '--config=tiny', '--dtypes=int8', alone=True)
    assert '--dtypes' in line
    line = refused(capsys, 'bench', 'convert', '--config=tiny', '--repeats=0', alone=True)
    assert '--repeats=0 must be above 0' in line
    given = '--config=tiny', '--config.model.attention_softcap=2.0', f'--directory={tmp_path}'
    line = refused(capsys, 'bench', 'convert', *given, '--config.model.vocab_size=99', alone=True)
    assert 'no family of Hugging Face' in line
