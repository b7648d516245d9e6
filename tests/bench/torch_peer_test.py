"""PyTorch's side of the comparison, without PyTorch: its batches, its FLOPs, its flags."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from refusals import refused

from helios_jax import cli, config, options
from helios_jax.arch import flops, weights
from helios_jax.bench import torch_peer
from helios_jax.bench.torch_peer import Peer
from helios_jax.config import GMU, Model, MoE
from helios_jax.errors import UserError

SMALL = Peer(batch=2, length=5, vocab=37, steps=4)


def test_its_flops_a_token_are_those_of_helios_without_gates():
    """Both sides' MFU count alike, but for the norms' scales, which are parameters of Llama."""
    peer = Peer()
    model = Model(
        vocab_size=peer.vocab, num_layers=peer.layers, embed_dim=peer.embed, num_heads=peer.heads,
        num_kv_heads=peer.kv_heads, head_dim=peer.head, mlp_dim=peer.mlp, gmu=GMU(kind='residual'),
    )  # fmt: skip
    ours = flops.flops_per_token(model, peer.length)
    assert peer.flops_per_token(weights.count(model)) == pytest.approx(ours, rel=1e-4)


def test_its_flops_a_token_are_those_of_active_experts():
    cfg = options.load_config('bench_qwen3_moe').resolve(32768)
    model = config.replace(cfg, {'model.gmu.kind': 'residual'}).model
    peer = torch_peer.same_shape(cfg)
    ours = flops.flops_per_token(model, peer.length)
    # Its norms' scales and its router, which both count, are within this.
    assert peer.flops_per_token(weights.count(model)) == pytest.approx(ours, rel=2e-4)


def test_speed_counts_the_timed_steps_alone():
    parameters = 1_000_000
    found = torch_peer.speed(SMALL, parameters, seconds=0.5, hardware='NVIDIA H100 80GB HBM3')
    assert found['tokens_per_second'] == 4 * 2 * 5 / 0.5
    assert found['step_seconds'] == 0.125
    assert found['tflops_per_second'] == 80 * SMALL.flops_per_token(parameters) / 1e12
    assert found['mfu'] == pytest.approx(found['tflops_per_second'] / 989)


def test_hardware_of_unknown_peak_has_no_mfu():
    found = torch_peer.speed(SMALL, 10_000, seconds=3.0, hardware='cpu')
    assert found['mfu'] is None
    assert 'NaN' not in json.dumps(found)


def test_random_batches_hold_ids_of_the_vocabulary():
    first, second = itertools.islice(torch_peer.batches(SMALL), 2)
    assert first.shape == (2, 5)
    assert (first != second).any()
    assert first.min() >= 0 and first.max() < 37


def test_batches_of_a_file_start_again_and_leave_out_what_fills_none(tmp_path):
    tokens = np.arange(23, dtype=np.uint16)
    np.save(tmp_path / 'tokens.npy', tokens)
    peer = Peer(batch=2, length=5, vocab=37, tokens=str(tmp_path / 'tokens.npy'))
    first, second, third = itertools.islice(torch_peer.batches(peer), 3)
    assert first.dtype == np.int64
    np.testing.assert_array_equal(np.concatenate([first, second]).ravel(), tokens[:20])
    np.testing.assert_array_equal(third, first)


@pytest.mark.parametrize(
    ('tokens', 'message'),
    [
        (np.arange(9), 'holds 9 values.*at least 10'),
        (np.full(10, 37), '--vocab=37'),
        (np.full(10, -1), 'from 0'),
        (np.ones(10), 'float64'),
        (None, 'cannot be read as a .npy file'),
    ],
)
def test_a_file_that_holds_no_such_tokens_is_refused(tokens, message, tmp_path):
    path = tmp_path / 'tokens.npy'
    path.write_bytes(b'no array') if tokens is None else np.save(path, tokens)
    with pytest.raises(UserError, match=message):
        next(torch_peer.batches(Peer(batch=2, length=5, vocab=37, tokens=str(path))))


def test_the_peer_of_a_config_has_its_shape():
    assert torch_peer.same_shape(options.load_config('helios_1b')) == Peer()
    peer = torch_peer.same_shape(options.load_config('bench_qwen3_moe'))
    assert (peer.experts, peer.chosen, peer.mlp, peer.layers, peer.heads) == (64, 8, 768, 8, 32)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.vocab_size': 0}, 'model.vocab_size=0'),
        ({'model.attention_softcap': 30.0}, 'softcap 30'),
        ({'model.period': 'dense,dense_window', 'model.window': 64}, 'dense, dense_window'),
    ],
)
def test_a_model_that_pytorch_lacks_has_no_peer(changes, message):
    cfg = config.replace(options.load_config('helios_1b'), changes)
    with pytest.raises(UserError, match=message):
        torch_peer.same_shape(cfg)


@pytest.mark.slow
@pytest.mark.parametrize('experts', [0, 4])
def test_the_peer_trains_a_model_of_our_size(experts):
    pytest.importorskip('transformers')
    peer = Peer(
        batch=2, length=24, steps=2, warmup=1, layers=2, embed=64, heads=4, kv_heads=2, head=16,
        mlp=48, experts=experts, chosen=2, vocab=256, device='cpu', eager=True,
    )  # fmt: skip
    row = torch_peer.measure_peer(dataclasses.asdict(peer))
    assert row['last_loss'] != row['first_loss']
    model = Model(
        vocab_size=256, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_dim=48, gmu=GMU(kind='residual'), qk_norm=experts > 0,  # as Qwen3 has it
        period='moe' if experts else 'dense', moe=MoE(num_experts=experts, num_experts_per_token=2),
    )  # fmt: skip
    assert row['parameters'] == weights.count(model)


def test_flags_are_the_fields(monkeypatch, capsys):
    given = []

    def measured(values):
        given.append(values)
        return {'tokens_per_second': 1234567.8, 'mfu': None, 'steps': 3}

    monkeypatch.setattr(torch_peer, 'measure_peer', measured)
    arguments = ['bench', 'torch_peer', '--batch=3', '--tokens=t.npy', '--eager', '--kv_heads=2']
    cli.main([*arguments, '--json'])
    printed = json.loads(capsys.readouterr().out)
    assert Peer(**given[0]) == Peer(batch=3, tokens='t.npy', eager=True, kv_heads=2)
    assert printed == {'tokens_per_second': 1234567.8, 'mfu': None, 'steps': 3}
    cli.main(arguments)
    assert capsys.readouterr().out == 'tokens_per_second: 1.23457e+06\nmfu: None\nsteps: 3\n'


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--steps=0', 'steps=0.*at least 1'),
        ('--experts=-1', 'experts=-1.*at least 0'),
        ('--kv_heads=3', 'kv_heads=3.*heads=16'),
        ('--experts=4', 'chosen=8.*experts=4'),
    ],
)
def test_a_shape_that_cannot_be_is_refused(flag, message, capsys):
    line = refused(capsys, 'bench', 'torch_peer', flag, alone=True)
    assert re.search(message, line), line
