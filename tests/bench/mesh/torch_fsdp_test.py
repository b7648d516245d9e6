"""PyTorch's side: FSDP2 of two processes on this CPU."""

import dataclasses

import pytest

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.bench.mesh import torch_fsdp
from helios_jax.bench.torch_peer import Peer
from helios_jax.errors import UserError

SMALL = Peer(
    batch=2, length=24, steps=2, warmup=1, layers=2, embed=64, heads=4, kv_heads=2, head=16,
    mlp=48, vocab=256, device='cpu', eager=True, checkpointing=True,
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_a_model_of_our_size():
    pytest.importorskip('transformers')
    row = torch_fsdp.measure_fsdp(dataclasses.asdict(SMALL), 2, 120.0)
    model = config.Model(
        vocab_size=256, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_dim=48, gmu=config.GMU(kind='residual'),
    )  # fmt: skip
    assert row['parameters'] == weights.count(model)
    assert row['last_loss'] != row['first_loss']
    tokens = row['card_tokens_per_second'] * row['step_ms'] / 1e3
    assert tokens == pytest.approx(2 * 24)


def test_more_devices_than_there_are_is_refused():
    torch = pytest.importorskip('torch')
    wanted = torch.cuda.device_count() + 1
    with pytest.raises(UserError, match=f'not {wanted}'):
        torch_fsdp.measure_fsdp(dataclasses.asdict(Peer()), wanted, 1.0)
