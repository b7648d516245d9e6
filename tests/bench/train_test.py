"""The bench of training: its variants, its lines, and a measurement of seconds."""

import dataclasses
import json

import pytest
import small_run

from helios_jax import config, options, process
from helios_jax.bench import torch_peer, train
from helios_jax.errors import UserError

ROW = {'kind': 'convex', 'packing': 'best_fit', 'tokens_per_second': 58_571.4, 'mfu': 0.42,
       'segment_mfu': 0.39, 'kernel_floors': {},
       'peak_gib': 51.93}  # fmt: skip
FLAGS = {'warmup_steps': 7, 'profiled_steps': 2, 'as_json': False}


@pytest.fixture
def processes(monkeypatch):
    """Instead of processes: what was called, and rows."""
    calls = []

    def run(function, *arguments, **_):
        calls.append((function, *arguments))
        if function is torch_peer.measure_peer:
            return {'tokens_per_second': 50_000.0}
        values, _, _ = arguments
        cfg = config.from_dict(values)
        return ROW | {'kind': cfg.model.gmu.kind, 'packing': cfg.data.packing}

    monkeypatch.setattr(process, 'run', run)
    return calls


def test_each_variant_runs_in_a_process_with_all_other_settings_kept(processes, capsys):
    changes = {'train.num_steps': 11, 'model.num_layers': 3, 'data.row_length': 48}
    cfg = config.replace(options.load_config('helios_1b'), changes)
    kinds, packings = ['residual', 'convex'], ['concatenate', 'best_fit']
    train.compare_training(cfg, kinds=kinds, packings=packings, with_peer=True, **FLAGS)
    *variants, peer = processes
    same = torch_peer.Peer(layers=3, length=48)
    assert peer == (torch_peer.measure_peer, dataclasses.asdict(same))
    expected = [(kind, packing) for packing in packings for kind in kinds]
    for (function, values, *steps), (kind, packing) in zip(variants, expected, strict=True):
        assert (function, steps) == (train.measure_training, [7, 2])
        assert config.from_dict(values) == train.variant(cfg, kind, packing)
        assert values['train']['num_steps'] == 11
        values['model']['gmu']['kind'] = cfg.model.gmu.kind
        values['data']['packing'] = cfg.data.packing
        assert config.from_dict(values) == cfg
    *rows, _, _, _, last = capsys.readouterr().out.splitlines()
    assert [json.loads(row)['tokens_per_second'] for row in rows] == [58_571.4] * 4 + [50_000]
    speed = 'MFU 0.420 (0.390 by segments)'
    assert last == f'convex     best_fit        58,571 tok/s  {speed}  51.9 GiB  1.17 × PyTorch'


def test_a_variant_that_is_none_is_refused_before_anything_runs(processes):
    kinds = ['residual', 'convicts']
    with pytest.raises(UserError, match=r"'convicts'.*'convex'"):
        train.compare_training(
            config.Config(), kinds=kinds, packings=['best_fit'], with_peer=False, **FLAGS
        )
    assert not processes


def test_a_model_that_pytorch_lacks_is_refused_before_anything_runs(processes):
    cfg = config.replace(options.load_config('helios_1b'), {'model.attention_softcap': 30.0})
    with pytest.raises(UserError, match='softcap'):
        train.compare_training(
            cfg, kinds=['residual'], packings=['best_fit'], with_peer=True, **FLAGS
        )
    assert not processes


def test_without_the_peer_a_line_says_nothing_of_it():
    assert train.describe(ROW, {}).endswith('51.9 GiB')


@pytest.mark.slow
def test_a_measurement_counts_the_steps_on_the_clock(tmp_path):
    cfg = config.replace(small_run.make_config(tmp_path), {'train.num_steps': 3})
    row = train.measure_training(dataclasses.asdict(cfg), 2, 1)
    assert len(row['losses']) == 2 + 3 + 1
    assert row['losses'][-1] < row['losses'][0]
    # Rows are full but for padding at their ends.
    batch_tokens = row['tokens_per_second'] * row['step_ms'] / 1e3
    assert 0.8 * 8 * 32 < batch_tokens <= 8 * 32 * 1.000001
    assert row['kind'] == cfg.model.gmu.kind
    assert sum(row['state_gib'].values()) > 0
    assert row['kernel_ms'] == row['kernel_floors'] == {}
