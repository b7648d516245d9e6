"""FLOPs of a token in closed form, against sums over layers, keys and visits."""

import dataclasses

import numpy as np
import pytest

from helios_jax import config
from helios_jax.arch import flops

D, N, K, H, F = 40, 6, 2, 8, 56
MIXED = config.Model(
    vocab_size=61, num_layers=5, embed_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=F,
    prefix='dense', period='moe_window,dense', window=3,
    moe=config.MoE(num_experts=5, num_experts_per_token=2, mlp_dim=24, num_shared_experts=1),
)  # fmt: skip
DENSE = {'prefix': '', 'period': 'dense'}
EXPERTS = {'prefix': 'moe', 'period': 'moe,moe_window', 'moe': config.MoE(num_experts=3)}
PATTERNS = {'mixed': {}, 'experts': EXPERTS}


@pytest.mark.parametrize(('length', 'window'), [(4096, 512), (1024, 1024), (1024, 5000), (300, 7)])
def test_attention_flops_count_the_visible_keys(length, window):
    model = dataclasses.replace(MIXED, window=window)  # two of five layers have a window
    full = np.minimum(np.arange(1, length + 1), length).mean()
    local = np.minimum(np.arange(1, length + 1), window).mean()
    # Forward 2 · 2 FLOPs a key and channel (q·k and weights · v), backward twice that.
    expected = 12 * N * H * (3 * full + 2 * local)
    np.testing.assert_allclose(flops.attention_flops(model, length), expected, rtol=5e-3)
    total = flops.flops_per_token(model, length)
    assert total == 6 * flops.active_matmul(model) + flops.attention_flops(model, length)


def test_flops_of_a_plain_network_are_the_textbooks():
    model = dataclasses.replace(MIXED, **DENSE, gmu=config.GMU(kind='residual'))
    layer = D * H * (2 * N + 2 * K) + 3 * D * F
    wanted = 6 * (5 * layer + D * 256) + 6 * 5 * 1000 * N * H
    assert flops.flops_per_token(model, 1000) == wanted
    assert flops.segment_flops_per_token(model, 500.0) == wanted


@pytest.mark.parametrize('window', [3, 20])
def test_segment_flops_count_what_each_kind_of_layer_sees(window):
    model = dataclasses.replace(MIXED, window=window)  # two of five layers have a window
    seen = np.concatenate([np.arange(1, length + 1) for length in (64, 1, 7, 30)])
    contexts = seen.mean(), np.minimum(seen, window).mean()
    attention = 12 * N * H * (3 * seen + 2 * np.minimum(seen, window)).mean()
    expected = 6 * flops.active_matmul(model) + attention
    assert flops.segment_flops_per_token(model, *contexts) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(('pattern', 'num_experts_per_token'), [('mixed', 2), ('experts', 3)])
def test_dropped_flops_are_those_of_the_visits_that_were_left_out(pattern, num_experts_per_token):
    model = dataclasses.replace(MIXED, **PATTERNS[pattern])

    def active(num_experts_per_token):
        chosen = {'moe.num_experts_per_token': num_experts_per_token}
        return flops.active_matmul(config.replace(model, chosen))

    a_visit = 6 * (active(2) - active(1))  # of one expert in each MoE layer
    model = config.replace(model, {'moe.num_experts_per_token': num_experts_per_token})
    assert flops.dropped_flops(model, 0.0) == 0
    for share in (0.25, 1.0):
        expected = share * num_experts_per_token * a_visit
        assert flops.dropped_flops(model, share) == pytest.approx(expected)
    assert a_visit > 0


def test_a_dense_network_drops_nothing():
    model = dataclasses.replace(MIXED, **DENSE)
    assert flops.dropped_flops(model, 0.5) == 0
