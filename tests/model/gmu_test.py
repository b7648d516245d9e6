"""Gated Memory Units: the start they promise, and every kind and gate against its formula."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import config
from helios_jax.model import flops
from helios_jax.model.gmu import GatedMemoryUnit
from helios_jax.model.transformer import Transformer

B, T, D, H = 2, 3, 24, 4
EPS = 1e-3  # large, so that a norm without it would show
INDEX = 5
KINDS = ('convex', 'additive', 'residual', 'layerscale', 'rezero', 'highway')
GATES = ('low_rank', 'full', 'per_head', 'scalar', 'static')
GATED = ('convex', 'additive', 'highway')
VARIANTS = [
    *itertools.product(GATED, GATES, ('on', 'off')),
    *itertools.product(('residual', 'layerscale', 'rezero'), ('low_rank',), ('on', 'off')),
]


def shape(**settings):
    gmu = config.GMU(**({'rank': 5} | settings))
    return config.Model(
        vocab_size=7, embed_dim=D, num_heads=3, num_kv_heads=1, head_dim=H, norm_eps=EPS, gmu=gmu
    )


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, D)).astype(np.float32) * s for s in (0.7, 1.1, 2.3)]


def unit(model, perturbed, index=INDEX):
    """A unit and its parameters, as initialised or moved away from it."""
    module = GatedMemoryUnit(model, 'mlp')
    arrays = [jnp.asarray(x) for x in inputs()]
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(1), *arrays, index))
    if perturbed:
        rng = np.random.default_rng(2)
        variables = jax.tree.map(
            lambda w: w + rng.normal(size=w.shape).astype(np.float32) * 0.4, variables
        )
    return module, variables


def rms(x, eps=EPS):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def formula(gmu, p, x, x_hat, u):
    """y, written from the definition in float64."""
    x, x_hat, u = (a.astype(np.float64) for a in (x, x_hat, u))
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    u_hat = rms(u) * p['output_norm']['scale'] if gmu.normalizes else u
    if gmu.kind == 'residual':
        return x + u_hat
    if gmu.kind in ('layerscale', 'rezero'):
        return x + p['scale'] * u_hat
    logits = np.zeros((B, T, 1))
    if gmu.gate != 'static':
        logits = x_hat @ p['from_input']['w']
        if gmu.kind != 'highway':
            logits = logits + rms(u) @ p['from_output']['w']
        if gmu.gate == 'low_rank':
            logits = logits @ p['out']['w']
    g = 1 / (1 + np.exp(-(logits + p['bias'])))
    if gmu.gate == 'per_head':
        g = np.stack([g[..., d // H] for d in range(D)], axis=-1)
    return x + g * u_hat if gmu.kind == 'additive' else x + g * (u_hat - x)


@pytest.mark.parametrize(('kind', 'gate', 'normalize'), VARIANTS)
def test_computes_its_formula_and_learns(kind, gate, normalize):
    model = shape(kind=kind, gate=gate, normalize_output=normalize)
    module, variables = unit(model, perturbed=True)
    arrays = inputs()

    @jax.jit
    def value_and_gradients(variables, *arrays):
        run = lambda variables, *arrays: module.apply(variables, *arrays, INDEX)  # noqa: E731
        y, vjp = jax.vjp(run, variables, *arrays)
        return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    y, gradients = value_and_gradients(variables, *arrays)
    params = variables.get('params', {})
    np.testing.assert_allclose(y, formula(model.gmu, params, *arrays), atol=2e-6, rtol=2e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients[0]):
        assert np.abs(gradient).min() > 0, jax.tree_util.keystr(path)
    # The stream always passes, the update always matters, x̂ only where a gate reads it.
    reads = kind in GATED and gate != 'static'
    for name, gradient in zip(('x', 'x_hat', 'update'), gradients[1:], strict=True):
        assert bool(np.any(gradient)) == (reads or name != 'x_hat'), name


@pytest.mark.parametrize('gate', GATES)
def test_the_gate_of_a_fresh_sublayer_is_one_over_its_index_plus_one(gate):
    module, variables = unit(shape(gate=gate, normalize_output='off'), perturbed=False)
    x, x_hat, update = (jnp.asarray(a) for a in inputs())
    for index in (1, 2, 7, 96):
        fresh = nn.unbox(jax.jit(module.init)(jax.random.key(1), x, x_hat, update, index))
        gate_value = (module.apply(fresh, x, x_hat, update, index) - x) / (update - x)
        np.testing.assert_allclose(gate_value, 1 / (index + 1), rtol=2e-3)
        bias = np.asarray(fresh['params']['bias'])
        np.testing.assert_allclose(bias, -np.log(index), rtol=1e-6, atol=1e-7)
        assert bias.dtype == np.float32


def test_a_constant_bias_ignores_the_index():
    model = shape(bias='-3', normalize_output='off')
    for index in (1, 7):
        module, variables = unit(model, perturbed=False, index=index)
        np.testing.assert_array_equal(variables['params']['bias'], np.float32(-3))
        x, x_hat, update = inputs()
        y = module.apply(variables, *(jnp.asarray(a) for a in (x, x_hat, update)), index)
        np.testing.assert_allclose(y, x + (update - x) / (1 + np.exp(3)), rtol=1e-5, atol=1e-6)


def test_initial_values_of_the_baselines():
    params = {kind: unit(shape(kind=kind), perturbed=False)[1] for kind in KINDS}
    assert not params['residual']
    np.testing.assert_array_equal(params['rezero']['params']['scale'], np.zeros(1, np.float32))
    np.testing.assert_array_equal(
        params['layerscale']['params']['scale'], np.full(D, 0.1, np.float32)
    )
    # Only convex normalises the sublayer's output unless told to.
    assert [k for k in KINDS if 'output_norm' in params[k].get('params', {})] == ['convex']


@pytest.mark.parametrize('gate', ('low_rank', 'full', 'per_head', 'scalar'))
def test_the_last_matrix_starts_at_zero_and_moves_first(gate):
    module, variables = unit(shape(gate=gate), perturbed=False)
    arrays = [jnp.asarray(x) for x in inputs()]

    @jax.jit
    def gradient(variables):
        loss = lambda v: jnp.sum(jnp.sin(module.apply(v, *arrays, INDEX)))  # noqa: E731
        return jax.grad(loss)(variables)

    last = {'out'} if gate == 'low_rank' else {'from_input', 'from_output'}
    weights, gradients = variables['params'], gradient(variables)['params']
    for name in {'from_input', 'from_output', 'out'} & set(weights):
        assert np.any(weights[name]['w']) == (name not in last), name
        assert np.any(gradients[name]['w']) == (name in last), name


def test_bfloat16_stream_is_mixed_in_float32():
    model = shape()
    module, variables = unit(model, perturbed=True)
    x, x_hat, update = (jnp.asarray(a, jnp.bfloat16) for a in inputs())
    y = module.apply(variables, x, x_hat, update, INDEX)
    assert y.dtype == jnp.bfloat16
    wide = [np.asarray(a, np.float32) for a in (x, x_hat, update)]
    expected = formula(model.gmu, variables['params'], *wide)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=2e-2, atol=2e-2)


def transformer(kind, num_layers, moe):
    """A random network of `kind`; `moe` makes every second layer a mixture."""
    return Transformer(
        config.Model(
            vocab_size=61,
            num_layers=num_layers,
            embed_dim=40,
            num_heads=6,
            num_kv_heads=2,
            head_dim=8,
            mlp_dim=56,
            period='dense,moe' if moe else 'dense',
            moe=config.MoE(num_experts=3, num_experts_per_token=2, mlp_dim=20),
            qk_norm=True,
            compute_dtype='float32',
            gmu=config.GMU(kind=kind, normalize_output='off'),
        )
    )


def without_gates(params):
    """The weights that the residual network has as well."""
    return {
        name: without_gates(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if not name.endswith('_gmu')
    }


@pytest.mark.parametrize('moe', [False, True], ids=['dense', 'moe'])
@pytest.mark.parametrize('sublayers', [4, 16, 48])
def test_fresh_convex_network_is_the_residual_network(sublayers, moe):
    """With u instead of û the stream is the residual stream divided by l, which a norm hides."""
    convex, residual = (transformer(k, sublayers // 2, moe) for k in ('convex', 'residual'))
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 61)
    positions = jnp.tile(jnp.arange(9)[None], (2, 1))

    @jax.jit
    def both():
        variables = nn.unbox(convex.init(jax.random.key(4), tokens, positions))
        shared = variables | {'params': without_gates(variables['params'])}
        return [
            model.apply(v, tokens, positions, method='logits')[..., :61]
            for model, v in ((convex, variables), (residual, shared))
        ]

    logits, expected = both()
    assert np.asarray(expected).std() > 0.3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_fresh_gates_of_a_scanned_network_follow_the_sublayer():
    model = transformer('convex', 6, moe=True)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens, tokens))['params']
    for layer, sublayer in itertools.product((0, 1), (0, 1)):
        name = ('attention_gmu', 'mlp_gmu')[sublayer]
        bias = np.asarray(params['periods'][f'layer_{layer}'][name]['bias'])
        index = 2 * (2 * np.arange(3) + layer) + sublayer + 1
        np.testing.assert_allclose(1 / (1 + np.exp(-bias[:, 0])), 1 / (index + 1), rtol=1e-6)
        np.testing.assert_array_equal(bias, np.repeat(bias[:, :1], 40, axis=1))


def test_default_gate_costs_at_most_three_percent_of_the_parameters():
    """Of Llama-3.1-8B's shape."""
    gated = config.Model(
        vocab_size=128_256, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8,
        head_dim=128, mlp_dim=14_336,
    )  # fmt: skip
    residual = dataclasses.replace(gated, gmu=config.GMU(kind='residual'))
    base, cost = flops.parameters(residual).total, flops.parameters(gated).total
    assert 8.0e9 < base < 8.1e9
    assert 0 < cost - base <= 0.03 * base
