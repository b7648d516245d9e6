"""Gated Memory Units: the start they promise, and every kind and gate against its formula."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.errors import UserError
from helios_jax.model.gmu import GatedMemoryUnit
from helios_jax.model.transformer import Transformer

B, T, D, H = 2, 3, 24, 4
EPS = 1e-3  # large, so that a norm without it would show
INDEX = 5
KINDS = ('convex', 'additive', 'residual', 'layerscale', 'rezero', 'highway')
GATES = ('low_rank', 'full', 'per_head', 'scalar', 'static')
GATED = ('convex', 'additive', 'highway')
QUICK = (('convex', 'low_rank'), ('convex', 'per_head'))
VARIANTS = [
    *itertools.product(GATED, GATES, ('on', 'off'), ('both',)),
    *(
        pytest.param(*form, marks=() if form[:2] in QUICK else pytest.mark.slow)
        for form in itertools.product(
            ('convex', 'additive'), GATES[:-1], ('on',), ('input', 'output')
        )
    ),
    *itertools.product(
        ('residual', 'layerscale', 'rezero'), ('low_rank',), ('on', 'off'), ('both',)
    ),
]


def shape(**settings):
    gmu = config.GMU(**({'rank': 5} | settings))
    return config.Model(
        vocab_size=7, embed_dim=D, num_heads=3, num_kv_heads=1, head_dim=H, norm_eps=EPS, gmu=gmu
    )


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, D)).astype(np.float32) * s for s in (0.7, 1.1, 2.3)]


def arrays():
    return [jnp.asarray(x) for x in inputs()]


def initialize(model, index=INDEX):
    """A unit's parameters at sublayer `index`, which may be an array of them."""
    module = GatedMemoryUnit(model, 'mlp')
    init = lambda index: nn.unbox(module.init(jax.random.key(1), *arrays(), index))
    made = jax.jit(jax.vmap(init) if np.ndim(index) else init)(index)
    return module, made.get('params', {})


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
        own = gmu.kind == 'highway'
        logits = 0.0
        if gmu.gate_input != 'output' or own:
            logits = logits + x_hat @ p['from_input']['w']
        if gmu.gate_input != 'input' and not own:
            logits = logits + rms(u) @ p['from_output']['w']
        if gmu.gate == 'low_rank':
            logits = logits @ p['out']['w']
    g = 1 / (1 + np.exp(-(logits + p['bias'])))
    if gmu.gate == 'per_head':
        g = np.stack([g[..., d // H] for d in range(D)], axis=-1)
    return x + g * u_hat if gmu.kind == 'additive' else x + g * (u_hat - x)


@pytest.mark.parametrize(('kind', 'gate', 'normalize', 'gate_input'), VARIANTS)
def test_computes_its_formula_and_learns(kind, gate, normalize, gate_input, random_variables):
    model = shape(kind=kind, gate=gate, normalize_output=normalize, gate_input=gate_input)
    module = GatedMemoryUnit(model, 'mlp')
    variables = random_variables(module, *arrays(), INDEX)
    run = lambda variables, *arrays: module.apply(variables, *arrays, INDEX)[0]
    y, vjp = jax.vjp(run, variables, *arrays())
    gradients = vjp(jnp.asarray(np.random.default_rng(4).normal(size=y.shape), y.dtype))

    expected = formula(model.gmu, variables.get('params', {}), *inputs())
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=2e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients[0]):
        assert np.abs(gradient).min() > 0, jax.tree_util.keystr(path)
    # The stream always passes, the update always matters, x̂ only where a gate reads it.
    reads = kind in GATED and gate != 'static' and gate_input != 'output'
    for name, gradient in zip(('x', 'x_hat', 'update'), gradients[1:], strict=True):
        assert bool(np.any(gradient)) == (reads or name != 'x_hat'), name


@pytest.mark.parametrize('parts', [0, 3])
@pytest.mark.parametrize('kind', ['convex', 'residual', 'rezero'])
def test_the_embedding_is_added_times_a_number_of_each_unit(kind, parts, random_variables):
    without = shape(kind=kind)
    model = dataclasses.replace(without, gmu=dataclasses.replace(without.gmu, embedding='on'))
    module = GatedMemoryUnit(model, 'mlp', backward_parts=parts)
    x_0 = jnp.asarray(np.random.default_rng(6).normal(size=(B, T, D)), jnp.float32)
    variables = random_variables(module, *arrays(), INDEX, None, x_0)
    run = lambda variables, x_0: module.apply(variables, *arrays(), INDEX, None, x_0)[0]
    y, vjp = jax.vjp(run, variables, x_0)
    params = variables['params']
    (alpha,) = params['embedding']
    expected = formula(model.gmu, params, *inputs()) + np.float64(alpha) * x_0
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=2e-5)
    cotangent = np.random.default_rng(4).normal(size=y.shape).astype(np.float32)
    gradient, d_x_0 = vjp(jnp.asarray(cotangent))
    np.testing.assert_allclose(d_x_0, alpha * cotangent, rtol=1e-5, atol=1e-6)
    (found,) = gradient['params']['embedding']
    np.testing.assert_allclose(found, np.sum(cotangent * x_0), rtol=1e-4)


def test_a_fresh_unit_adds_nothing_of_the_embedding():
    module, params = initialize(shape(embedding='on'))
    np.testing.assert_array_equal(params['embedding'], np.zeros(1, np.float32))
    plain = {name: value for name, value in params.items() if name != 'embedding'}
    y, _ = module.apply({'params': params}, *arrays(), INDEX, None, 3 * arrays()[1])
    expected, _ = GatedMemoryUnit(shape(), 'mlp').apply({'params': plain}, *arrays(), INDEX)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize('parts', [0, 3])
@pytest.mark.parametrize('kind', ['convex', 'residual', 'rezero'])
def test_the_stream_is_multiplied_by_a_number_of_each_unit(kind, parts, random_variables):
    model = shape(kind=kind, stream_scale='on')
    module = GatedMemoryUnit(model, 'mlp', backward_parts=parts)
    variables = random_variables(module, *arrays(), INDEX)
    run = lambda variables: module.apply(variables, *arrays(), INDEX)[0]
    y, vjp = jax.vjp(run, variables)
    params, x = variables['params'], inputs()[0]
    (factor,) = params['stream_scale']
    expected = formula(model.gmu, params, *inputs()) + (np.float64(factor) - 1) * x
    np.testing.assert_allclose(y, expected, atol=2e-6, rtol=2e-5)
    cotangent = np.random.default_rng(4).normal(size=y.shape).astype(np.float32)
    (gradient,) = vjp(jnp.asarray(cotangent))
    (found,) = gradient['params']['stream_scale']
    np.testing.assert_allclose(found, np.sum(cotangent * x), rtol=1e-4)


def test_a_fresh_unit_leaves_the_stream_as_it_is():
    module, params = initialize(shape(stream_scale='on'))
    assert params.pop('stream_scale') == np.ones(1)
    plain = GatedMemoryUnit(shape(), 'mlp').apply({'params': params}, *arrays(), INDEX)[0]
    fresh = params | {'stream_scale': jnp.ones(1)}
    y, _ = module.apply({'params': fresh}, *arrays(), INDEX)
    np.testing.assert_array_equal(y, plain)


@pytest.mark.parametrize('gate', GATES)
def test_the_gate_can_be_looked_at(gate, random_variables):
    module = GatedMemoryUnit(shape(gate=gate, normalize_output='off'), 'mlp')
    x, x_hat, update = arrays()
    variables = random_variables(module, x, x_hat, update, INDEX)
    (y, _), seen = module.apply(variables, x, x_hat, update, INDEX, mutable=['intermediates'])
    (g,) = seen['intermediates']['gate']
    assert np.ptp(g) > 0.1
    np.testing.assert_allclose(x + g * (update - x), y, atol=2e-6, rtol=2e-5)
    (stream_rms,) = seen['intermediates']['stream_rms']
    np.testing.assert_allclose(stream_rms, np.sqrt(np.mean(np.square(x), axis=-1)), rtol=1e-5)


@pytest.mark.parametrize('gate', GATES)
def test_backward_reads_the_stream_and_the_update_and_no_float32_of_their_size(gate):
    model = shape(gate=gate)
    _, params = initialize(model)
    x, x_hat, update = (a.astype(jnp.bfloat16) for a in arrays())

    def read_by_backward(backward_parts):
        module = GatedMemoryUnit(model, 'mlp', backward_parts)
        run = lambda params, *arrays: module.apply({'params': params}, *arrays, INDEX)[0]
        _, vjp = jax.vjp(run, params, x, x_hat, update)
        return [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape == (B, T, D)]

    assert jnp.dtype('float32') in {leaf.dtype for leaf in read_by_backward(0)}
    large = read_by_backward(1)
    assert {leaf.dtype for leaf in large} == {jnp.dtype('bfloat16')}
    known = [leaf for leaf in large if any(np.array_equal(leaf, a) for a in (x, x_hat, update))]
    assert len(large) - len(known) == (gate == 'full')  # whose logits are of their size


@pytest.mark.parametrize('gate', GATES)
def test_the_gate_of_a_fresh_sublayer_is_one_over_its_index_plus_one(gate):
    indices = np.array([1, 2, 7, 96])
    module, params = initialize(shape(gate=gate, normalize_output='off'), indices)
    x, x_hat, update = arrays()
    for row, index in enumerate(indices):
        fresh = {'params': jax.tree.map(lambda w, row=row: w[row], params)}
        y, _ = module.apply(fresh, x, x_hat, update, index)
        np.testing.assert_allclose(y, x + (update - x) / (index + 1), rtol=1e-5, atol=1e-6)
        bias = fresh['params']['bias']
        np.testing.assert_allclose(bias, np.full(len(bias), -np.log(index)), rtol=1e-6, atol=1e-7)
        assert bias.dtype == np.float32


def test_a_highway_that_is_to_see_its_output_is_refused():
    with pytest.raises(UserError, match=r"gate_input='output'.*highway"):
        config.GMU(kind='highway', gate_input='output')


def test_a_constant_bias_ignores_the_index():
    module, params = initialize(shape(bias='-3', normalize_output='off'), np.array([1, 7]))
    np.testing.assert_array_equal(params['bias'], np.full((2, D), -3, np.float32))
    x, x_hat, update = arrays()
    fresh = {'params': jax.tree.map(lambda w: w[1], params)}
    y, _ = module.apply(fresh, x, x_hat, update, 7)
    np.testing.assert_allclose(y, x + (update - x) / (1 + np.exp(3)), rtol=1e-5, atol=1e-6)


def test_initial_values_of_the_baselines():
    params = {kind: initialize(shape(kind=kind))[1] for kind in KINDS}
    assert not params['residual']
    np.testing.assert_array_equal(params['rezero']['scale'], np.zeros(1, np.float32))
    np.testing.assert_array_equal(params['layerscale']['scale'], np.full(D, 0.1, np.float32))
    # Only convex normalises the sublayer's output unless told to.
    assert [kind for kind in KINDS if 'output_norm' in params[kind]] == ['convex']


@pytest.mark.parametrize(
    ('gate', 'gate_input'),
    [
        *itertools.product(('low_rank', 'full', 'per_head', 'scalar'), ('both',)),
        *itertools.product(('low_rank', 'scalar'), ('input', 'output')),
        *(
            pytest.param(*form, marks=pytest.mark.slow)
            for form in itertools.product(('full', 'per_head'), ('input', 'output'))
        ),
    ],
)
def test_the_last_matrix_starts_at_zero_and_moves_first(gate, gate_input):
    module, params = initialize(shape(gate=gate, gate_input=gate_input))
    loss = lambda p: jnp.sum(jnp.sin(module.apply({'params': p}, *arrays(), INDEX)[0]))
    gradients = jax.grad(loss)(params)
    last = {'out'} if gate == 'low_rank' else {'from_input', 'from_output'}
    for name in {'from_input', 'from_output', 'out'} & set(params):
        assert np.any(params[name]['w']) == (name not in last), name
        assert np.any(gradients[name]['w']) == (name in last), name


def test_a_bfloat16_stream_is_rounded_once(random_variables):
    module = GatedMemoryUnit(shape(gate='static', normalize_output='off'), 'mlp')
    variables = random_variables(module, *arrays(), INDEX)
    narrow = [a.astype(jnp.bfloat16) for a in arrays()]
    y, _ = module.apply(variables, *narrow, INDEX)
    assert y.dtype == jnp.bfloat16
    expected = formula(module.model.gmu, variables['params'], *map(np.asarray, narrow))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8)


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


def split_gates(params):
    """Parameters without and with nothing but the GMUs."""
    rest, gates = {}, {}
    for name, value in params.items():
        if name.endswith('_gmu'):
            gates[name] = value
        elif isinstance(value, dict):
            rest[name], below = split_gates(value)
            gates |= {name: below} if below else {}
        else:
            rest[name] = value
    return rest, gates


def merge(a, b):
    shared = {name: merge(a[name], b[name]) for name in a.keys() & b.keys()}
    return a | b | shared


TOKENS = jax.ShapeDtypeStruct((1, 2), jnp.int32)


def fresh_gates(model):
    zeros = jnp.zeros(TOKENS.shape, TOKENS.dtype)
    make = lambda: split_gates(nn.unbox(model.init(jax.random.key(0), zeros, zeros)['params']))[1]
    return jax.jit(make)()


@pytest.mark.parametrize(
    ('sublayers', 'moe'),
    [
        (4, False),
        pytest.param(48, False, marks=pytest.mark.slow),
        pytest.param(16, False, marks=pytest.mark.slow),
        pytest.param(48, True, marks=pytest.mark.slow),
    ],
)
def test_fresh_convex_network_is_the_residual_network(sublayers, moe, random_variables):
    """With u instead of û the stream is the residual stream divided by l, which a norm hides."""
    convex, residual = (transformer(k, sublayers // 2, moe) for k in ('convex', 'residual'))
    variables = random_variables(residual, TOKENS, TOKENS)
    params = merge(variables['params'], fresh_gates(convex))
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 61)
    positions = jnp.tile(jnp.arange(9)[None], (2, 1))
    logits, expected = (
        jax.jit(lambda v, m=m: m.apply(v, tokens, positions, method='logits')[..., :61])(v)
        for m, v in ((convex, variables | {'params': params}), (residual, variables))
    )
    assert np.asarray(expected).std() > 0.3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_fresh_gates_of_a_scanned_network_follow_the_sublayer():
    gates = fresh_gates(transformer('convex', 6, moe=True))['periods']
    for layer, sublayer in itertools.product((0, 1), (0, 1)):
        bias = np.asarray(gates[f'layer_{layer}'][('attention_gmu', 'mlp_gmu')[sublayer]]['bias'])
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
    base, cost = weights.count(residual), weights.count(gated)
    assert 8.0e9 < base < 8.1e9
    assert 0 < cost - base <= 0.03 * base
