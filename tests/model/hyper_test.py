"""Hyper-connections: the start they promise, their formulas in float64, and the whole network."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from helios_jax import config
from helios_jax.arch import flops
from helios_jax.errors import UserError
from helios_jax.evaluate import decoding
from helios_jax.memory.jaxprs import equations, primitive
from helios_jax.model import hyper
from helios_jax.model.hyper import HyperConnection
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import compiler_options
from helios_jax.parallel import mesh as meshes

FORMS = ('static', 'dynamic', 'constrained')
NO_POLICY = config.Memory('none')
QUICK = (('static', 'on'), ('dynamic', 'off'))
B, T, D, N, INDEX = 2, 3, 10, 4, 7
EPS = 1e-3  # large, so that a norm without it would show
MODEL = config.Model(
    vocab_size=61, num_layers=3, embed_dim=40, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=56,
    compute_dtype='float32', norm_eps=EPS,
)  # fmt: skip
MIXED = {
    'num_layers': 5, 'prefix': 'dense', 'period': 'dense_window,moe', 'window': 5,
    'moe': config.MoE(num_experts=4, num_experts_per_token=2, mlp_dim=24),
}  # fmt: skip


def before_a_release(*cases):
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


def gmu(form, **settings):
    return config.GMU(kind='hyper', hyper=form, **settings)


def network(form, memory=NO_POLICY, **changes):
    unit = gmu(form, streams=3) if form else config.GMU(kind='residual')
    return Transformer(dataclasses.replace(MODEL, gmu=unit, **changes), memory)


def unit_of(form, normalize='off'):
    model = config.Model(
        embed_dim=D, head_dim=4, norm_eps=EPS, gmu=gmu(form, streams=N, normalize_output=normalize)
    )
    return HyperConnection(model, 'mlp', again=True)


def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, N * D)), 1.7 * rng.normal(size=(B, T, D))


def formula(form, p, x, u, normalizes):
    """h and the new streams, written out from the papers' definitions, a stream at a time."""
    rms = lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPS)
    H = [x[..., i * D : (i + 1) * D] for i in range(N)]
    rows = [p['bias'][i * (N + 2) : (i + 1) * (N + 2)] + jnp.zeros((B, T, N + 2)) for i in range(N)]
    if form == 'dynamic':
        s_alpha, s_beta = p['alpha']
        s = jnp.stack([s_alpha, s_beta, *[s_alpha] * N])
        rows = [
            row + s * jnp.tanh(rms(h) @ p['from_streams']['w'])
            for row, h in zip(rows, H, strict=True)
        ]
    if form == 'constrained':
        a_pre, a_post, a_res = p['alpha']
        a = jnp.stack([a_pre, a_post, *[a_res] * N])
        added = (rms(x) @ p['from_streams']['w']).reshape(B, T, N, N + 2)
        rows = [row + a * added[:, :, i] for i, row in enumerate(rows)]
    pre, post = (jnp.stack([row[..., k] for row in rows], -1) for k in (0, 1))
    res = jnp.stack([row[..., 2:] for row in rows], -2)
    if form == 'constrained':
        pre, post, res = 1 / (1 + jnp.exp(-pre)), 2 / (1 + jnp.exp(-post)), jnp.exp(res)
        for _ in range(20):
            res = res / res.sum(-1, keepdims=True)
            res = res / res.sum(-2, keepdims=True)
    u = rms(u) * p['output_norm']['scale'] if normalizes else u
    h = sum(pre[..., i : i + 1] * H[i] for i in range(N))
    new = [sum(res[..., i, j][..., None] * H[i] for i in range(N)) for j in range(N)]
    new = [new[j] + post[..., j : j + 1] * u for j in range(N)]
    return h, jnp.concatenate(new, -1)


@pytest.mark.parametrize(
    ('form', 'normalize'),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(FORMS, ('off', 'on'))
    ],
)
def test_value_and_gradient_are_those_of_the_papers_formulas(form, normalize, random_variables):
    module = unit_of(form, normalize)
    variables = random_variables(module, jnp.asarray(inputs()[0], jnp.float32), INDEX)

    def ours(p, x, u):
        h, write = module.apply({'params': p}, x, INDEX)
        return h, write(u)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradient(function, arguments, cotangents):
        value, vjp = jax.vjp(function, *arguments)
        return value, vjp(cotangents)

    theirs = functools.partial(formula, form, normalizes=normalize == 'on')
    rng = np.random.default_rng(4)
    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        p = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), variables['params'])
        arguments = (p, *(jnp.asarray(a) for a in inputs()))
        cotangents = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in reversed(inputs()))
        found = with_gradient(ours, arguments, cotangents)
        expected = with_gradient(theirs, arguments, cotangents)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
    for path, gradient in jax.tree.leaves_with_path(found[1]):
        assert np.abs(gradient).max() > 1e-3, jax.tree_util.keystr(path)


@pytest.mark.parametrize('form', FORMS)
def test_a_fresh_unit_reads_one_stream_and_keeps_all(form):
    module = unit_of(form)
    x = jnp.asarray(inputs()[0], jnp.float32)

    @jax.jit
    def fresh(index):
        variables = nn.unbox(module.init(jax.random.key(0), x, index))
        seen = module.apply(variables, x, index, mutable=['intermediates'])[1]
        return seen['intermediates']['coefficients'][0]

    for index in (1, 4, 6):
        found = fresh(index)
        own = np.eye(N)[(index - 1) % N]
        other = hyper.OTHERS if form == 'constrained' else 0.0
        pre, res = (other + (1 - N * other) * one for one in (own, np.eye(N)))
        for got, wanted in zip(found, (pre, np.ones(N), res), strict=True):
            wanted = np.broadcast_to(wanted, got.shape)
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dynamic', 'constrained', *before_a_release(('static',))])
def test_a_fresh_network_is_the_residual_network(form):
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 61)
    positions = jnp.tile(jnp.arange(9)[None], (2, 1))
    logits = {}
    for kind in ('', form):
        model = network(kind)
        run = jax.jit(lambda model=model: model.apply(
            nn.unbox(model.init(jax.random.key(5), tokens, positions)),
            tokens, positions, method='logits',
        )[..., :61])  # fmt: skip
        logits[kind] = np.asarray(run())
    assert logits[''].std() > 0.3
    np.testing.assert_allclose(logits[form], logits[''], rtol=0, atol=2e-5)


@pytest.mark.parametrize('size', [1.0, 30.0, 1e4])
def test_sinkhorn_is_doubly_stochastic(size):
    logits = size * jax.random.normal(jax.random.key(1), (5, 7, N, N))
    mixed, gradient = jax.vjp(hyper.sinkhorn, logits)
    assert (mixed >= 0).all()
    # A new stream's shares come last; rows are as near as 20 steps come to the limit.
    np.testing.assert_allclose(mixed.sum(-2), 1, rtol=1e-5)
    if size == 1:
        np.testing.assert_allclose(mixed.sum(-1), 1, atol=1e-3)
    assert np.isfinite(gradient(mixed)[0]).all()


def test_no_stream_of_constrained_units_grows(random_variables):
    module = unit_of('constrained')
    x = jnp.asarray(inputs()[0], jnp.float32)
    variables = random_variables(module, x, INDEX)
    _, write = module.apply(variables, x, INDEX)
    new = write(jnp.zeros((B, T, D)))
    largest = lambda x: np.abs(np.asarray(x).reshape(B, T, N, D)).max(-2)
    assert (largest(new) <= largest(x) * (1 + 1e-5)).all()


@functools.cache
def trained(form):
    """Variables of the network in which nothing is at its start, but nothing far from it.

    Random mixes of streams would make too much of rounding.
    """
    model = network(form, **MIXED)
    first = hyper.first_bias(model.model.gmu, 1).ravel()

    def near_its_start(path, value):
        is_bias = path[-1].key == 'bias' and 'gmu' in path[-2].key
        return first[(None,) * (value.ndim - 1)] + 0.2 * value if is_bias else value

    variables = random_weights(abstract_variables(model), seed=2)
    return jax.tree_util.tree_map_with_path(near_its_start, variables)


def tokens_of(rows, length):
    return np.random.default_rng(2).integers(0, 61, (rows, length)).astype(np.int32)


def loss_and_gradient(form, memory=NO_POLICY, mesh=None):
    tokens = jnp.asarray(tokens_of(8, 12))
    positions = jnp.tile(jnp.arange(12)[None], (8, 1))
    variables = trained(form)

    def loss(params):
        given = variables | {'params': params}
        hidden, _ = network(form, memory, **MIXED).apply(given, tokens, positions)
        return jnp.mean(jnp.square(hidden * jnp.arange(40.0).reshape(1, 1, 40)))

    run = jax.jit(jax.value_and_grad(loss))
    if mesh is None:
        return run(variables['params'])
    with jax.set_mesh(meshes.make(mesh, jax.devices()[:8])):
        return run(variables['params'])


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-4 * np.abs(b).max())
    jax.tree.map(near, found[1], expected[1])


@pytest.mark.slow
def test_alike_streams_get_unlike_gradients():
    """Else they would stay alike for ever; under constraints the one that is read differs."""
    tokens = jnp.asarray(tokens_of(2, 12))
    model = network('constrained')
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens, tokens))

    def loss(params):
        hidden, _ = model.apply(variables | {'params': params}, tokens, tokens)
        return jnp.sum(jnp.square(hidden) * jnp.arange(40.0).reshape(1, 1, 40))

    gradient = jax.jit(jax.grad(loss))(variables['params'])['periods']['layer_0']
    for unit in ('attention_gmu', 'mlp_gmu'):  # above the last two layers some stream is not read
        post = np.asarray(gradient[unit]['bias'])[:1].reshape(1, 3, 5)[..., 1]
        assert (np.ptp(post, axis=-1) > 1e-2 * np.abs(post).max()).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('form', 'sizes'),
    [
        ('dynamic', {'data': 2, 'fsdp': 4}),
        *before_a_release(
            ('constrained', {'fsdp': 2, 'context': 2, 'tensor': 2}),
            ('static', {'data': 2, 'fsdp': 4}),
            ('dynamic', {'fsdp': 2, 'context': 2, 'tensor': 2}),
        ),
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_does(form, sizes):
    memory = config.Memory('full')
    alone = loss_and_gradient(form, memory)
    assert_same(loss_and_gradient(form, memory, config.Mesh(**sizes)), alone)


@pytest.mark.long
@pytest.mark.parametrize('form', ['dynamic', 'constrained'])
def test_parts_and_unrolled_layers_compute_the_same(form):
    plain = loss_and_gradient(form)
    for memory in (config.Memory('full', backward_parts=2), config.Memory(layers='unrolled')):
        assert_same(loss_and_gradient(form, memory), plain)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dynamic', *before_a_release(('static',), ('constrained',))])
def test_decoding_with_a_cache_is_recomputation(form):
    model, variables = network(form, **MIXED), trained(form)
    (row,) = tokens_of(1, 11)
    where = jnp.arange(11, dtype=jnp.int32)[None]
    run = jax.jit(functools.partial(model.apply, method='logits'))
    whole = np.asarray(run(variables, jnp.asarray(row[None]), where))[0, :, :61]
    assert whole.std() > 0.3
    logits, cache = decoding.prefill(model, variables, [row[:5].tolist()], 4)
    for t in range(5, 11):
        np.testing.assert_allclose(logits[0, :61], whole[t - 1], rtol=2e-4, atol=2e-4)
        column = lambda x: np.full((1, 1), x, np.int32)
        logits, cache = decoding.extending(compiler_options.DECODING)(
            variables, cache, column(row[t]), column(t), column(1), model=model
        )
    np.testing.assert_allclose(logits[0, :61], whole[-1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('form', FORMS)
def test_matmul_flops_beside_a_residual_networks_are_counted_as_traced(form):
    tokens = jax.ShapeDtypeStruct((B, 12), jnp.int32)

    def multiplications(model):
        shapes = nn.unbox(abstract_variables(model))
        total = 0
        for e in equations(jax.make_jaxpr(lambda v, t: model.apply(v, t, t)[0])(shapes, tokens)):
            if primitive(e) == 'dot_general':
                (contracted, _), _ = e.params['dimension_numbers']
                sizes = [e.invars[0].aval.shape[axis] for axis in contracted]
                total += e.outvars[0].aval.size * int(np.prod(sizes))
        return total

    # One layer: no equation of a scan runs more than once.
    ours, plain = (network(f, num_layers=1) for f in (form, ''))
    counted = flops.active_matmul(ours.model) - flops.active_matmul(plain.model)
    assert multiplications(ours) - multiplications(plain) == counted * B * 12
    assert (counted > 0) == (form != 'static')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'hyper': 'mhc'}, r"hyper='mhc'.*'static', 'dynamic', 'constrained'"),
        ({'hyper': 'static', 'streams': 1}, r'streams=1 must lie between 2 and 64.*residual'),
        ({'hyper': 'static', 'streams': 65}, r'streams=65 must lie between 2 and 64'),
        ({'hyper': 'dynamic', 'embedding': 'on'}, r"embedding='on'.*hyper.*off"),
        ({'hyper': 'dynamic', 'stream_scale': 'on'}, r"stream_scale='on'.*hyper.*off"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        config.GMU(kind='hyper', **settings)
    assert '\n' not in str(caught.value)
