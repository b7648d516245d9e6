"""Rotary tables against transformers', and against the papers' formulas written out again."""

import math

import numpy as np
import pytest

from helios_jax import config
from helios_jax.model import rope

FACTORS = (2, 4, 16, 40)
# base, L_train, H: a long-context model, Llama-2's, and one whose ramp is cut off at both ends.
SHAPES = ((500_000.0, 8192, 128), (10_000.0, 4096, 96), (100.0, 24, 10))


def settings(base, trained, **changes):
    return config.Rope(base=base, trained_length=trained, scaling='static', **changes)


def plain(base, H):
    return np.array([base ** (-2 * i / H) for i in range(H // 2)])


def ramp(setting, H):
    """γ_i of every pair, from the definition: 1 keeps θ_i, 0 divides it by s."""
    length, fast, slow = setting.trained_length, setting.beta_fast, setting.beta_slow
    gammas = []
    # The (fractional) index whose frequency turns this often over the trained length.
    index = lambda turns: H / 2 * math.log(length / (2 * math.pi * turns), setting.base)
    low, high = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), H - 1)
    for i, theta in enumerate(plain(setting.base, H)):
        if setting.ramp == 'linear_in_rotations':
            gamma = (length * theta / (2 * math.pi) - slow) / (fast - slow)
        else:
            gamma = (high - i) / (high - low)
        gammas.append(min(1.0, max(0.0, gamma)))
    return np.array(gammas)


def scaled(setting, H, factor):
    theta, gamma = plain(setting.base, H), ramp(setting, H)
    return (1 - gamma) * theta / factor + gamma * theta


@pytest.mark.parametrize('ramp_name', ['linear_in_dimension', 'linear_in_rotations'])
@pytest.mark.parametrize(('base', 'trained', 'H'), SHAPES)
@pytest.mark.parametrize('factor', FACTORS)
def test_static_tables_follow_the_formula(factor, base, trained, H, ramp_name):
    setting = settings(base, trained, factor=float(factor), ramp=ramp_name)
    table = rope.tables(setting, H, length=trained * 3)
    assert table.frequencies.dtype == table.query_scale.dtype == np.float32
    np.testing.assert_allclose(table.frequencies, scaled(setting, H, factor)[None], rtol=1e-6)
    np.testing.assert_allclose(table.query_scale, [(0.1 * math.log(factor) + 1) ** 2], rtol=1e-6)


@pytest.mark.parametrize('ramp_name', ['linear_in_dimension', 'linear_in_rotations'])
def test_the_ramps_ends_and_middle(ramp_name):
    """High frequencies stay, low ones are divided by s, some lie between; the ramps differ."""
    setting = settings(*SHAPES[0][:2], factor=4.0, ramp=ramp_name)
    ratio = rope.frequencies(setting, 128, 4.0) / plain(SHAPES[0][0], 128)
    turns = setting.trained_length * plain(setting.base, 128) / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 45], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 1 / 4, rtol=1e-6)
    assert ((ratio > 0.26) & (ratio < 0.99)).sum() > 8
    assert (np.diff(ratio) <= 1e-6).all()
    other = settings(*SHAPES[0][:2], ramp='linear_in_dimension')
    differs = np.abs(rope.frequencies(other, 128, 4.0) / plain(SHAPES[0][0], 128) - ratio).max()
    assert (differs > 0.1) == (ramp_name == 'linear_in_rotations')


@pytest.mark.parametrize(('base', 'trained', 'H'), SHAPES)
def test_betas_move_the_ramp(base, trained, H):
    setting = settings(base, trained, factor=8.0, beta_fast=3.0, beta_slow=0.5)
    got = rope.tables(setting, H, 5).frequencies[0]
    np.testing.assert_allclose(got, scaled(setting, H, 8), rtol=1e-6)
    assert np.abs(got - scaled(settings(base, trained), H, 8)).max() > 1e-4


def test_no_scaling_is_plain_rotation_at_any_length():
    setting = config.Rope(base=777.0, trained_length=16, factor=5.0)
    table = rope.tables(setting, 6, length=16 * 9)
    np.testing.assert_allclose(table.frequencies, plain(777.0, 6)[None], rtol=1e-6)
    np.testing.assert_array_equal(table.query_scale, np.ones(1, np.float32))


@pytest.mark.parametrize(
    ('trained', 'length'), [(24, 24), (24, 25), (7, 7 * 8), (7, 7 * 8 + 1), (5, 3)]
)
def test_dynamic_tables_have_a_bucket_for_every_power_of_two(trained, length):
    setting = config.Rope(base=100.0, scaling='dynamic', trained_length=trained)
    table = rope.tables(setting, 10, length)
    for t in range(length):
        scale = 1
        while scale * trained < t + 1:
            scale *= 2
        assert scale == 2 ** math.ceil(math.log2(max(1, (t + 1) / trained)))
        bucket = int(math.log2(scale))
        expected = plain(100.0, 10) if scale == 1 else scaled(setting, 10, scale)
        np.testing.assert_allclose(table.frequencies[bucket], expected, rtol=1e-6)
        temperature = 0.1 * math.log(scale) + 1
        np.testing.assert_allclose(table.query_scale[bucket], temperature**2, rtol=1e-6)
    assert len(table.frequencies) == len(table.query_scale) == bucket + 1


THEIRS = {  # what their config says; what ours says
    'yarn': ({}, {'scaling': 'static'}),
    'yarn_mscale': (
        {'rope_type': 'yarn', 'mscale': 0.7, 'mscale_all_dim': 0.3, 'truncate': False},
        {'scaling': 'static', 'truncate': False, 'mscale': (0.7, 0.3)},
    ),
    'yarn_factor': (
        {'rope_type': 'yarn', 'attention_factor': 1.3, 'beta_fast': 20, 'beta_slow': 2},
        {'scaling': 'static', 'attention_factor': 1.3, 'beta_fast': 20.0, 'beta_slow': 2.0},
    ),
    'linear': ({}, {'scaling': 'linear'}),
    'llama3': (
        {'low_freq_factor': 1.5, 'high_freq_factor': 5.0},
        {'scaling': 'llama3', 'beta_slow': 1.5, 'beta_fast': 5.0},
    ),
}


@pytest.mark.parametrize(('base', 'trained', 'H'), SHAPES[:2])
@pytest.mark.parametrize('factor', FACTORS)
@pytest.mark.parametrize('name', THEIRS)
def test_tables_equal_transformers(name, factor, base, trained, H):
    pytest.importorskip('torch', reason="needs torch: pip install 'helios_jax[parity]'")
    rope_utils = pytest.importorskip(
        'transformers.modeling_rope_utils',
        reason="needs transformers: pip install 'helios_jax[parity]'",
    )
    from transformers import LlamaConfig

    said, settings = THEIRS[name]
    kind = said.get('rope_type', name)
    theirs = LlamaConfig(
        hidden_size=3 * H,
        num_attention_heads=3,
        head_dim=H,
        max_position_embeddings=factor * trained,
        rope_parameters={
            'rope_type': kind,
            'rope_theta': base,
            'factor': float(factor),
            'original_max_position_embeddings': trained,
            **said,
        },
    )
    frequencies, temperature = rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs, 'cpu')
    settings = dict(settings)
    if 'mscale' in settings:
        m, all_dims = (0.1 * scale * math.log(factor) + 1 for scale in settings.pop('mscale'))
        settings['attention_factor'] = m / all_dims
    setting = config.Rope(base=base, trained_length=trained, factor=float(factor), **settings)
    ours = rope.tables(setting, H, factor * trained)
    np.testing.assert_allclose(ours.frequencies[0], frequencies.numpy(), rtol=0, atol=1e-6)
    # Beyond the absolute bound: the low frequencies lie below it altogether.
    np.testing.assert_allclose(ours.frequencies[0], frequencies.numpy(), rtol=1e-5)
    assert abs(rope.attention_temperature(setting, float(factor)) - temperature) < 1e-6
    np.testing.assert_allclose(np.sqrt(ours.query_scale), [temperature], atol=1e-6)


@pytest.mark.parametrize('buckets', [1, 3])
def test_ntk_tables_equal_transformers_at_the_end_of_each_bucket(buckets):
    pytest.importorskip('torch', reason="needs torch: pip install 'helios_jax[parity]'")
    rope_utils = pytest.importorskip(
        'transformers.modeling_rope_utils',
        reason="needs transformers: pip install 'helios_jax[parity]'",
    )
    from transformers import LlamaConfig

    base, trained, H = SHAPES[1]
    theirs = LlamaConfig(
        hidden_size=3 * H,
        num_attention_heads=3,
        head_dim=H,
        max_position_embeddings=trained,
        rope_parameters={'rope_type': 'dynamic', 'rope_theta': base, 'factor': 3.0},
    )
    setting = config.Rope(base=base, trained_length=trained, scaling='ntk', factor=3.0)
    ours = rope.tables(setting, H, trained * 2 ** (buckets - 1))
    assert len(ours.frequencies) == buckets
    np.testing.assert_array_equal(ours.query_scale, np.ones(buckets, np.float32))
    for c, table in enumerate(ours.frequencies):
        expected, _ = rope_utils.ROPE_INIT_FUNCTIONS['dynamic'](theirs, 'cpu', trained * 2**c)
        np.testing.assert_allclose(table, expected.numpy(), rtol=1e-5)
