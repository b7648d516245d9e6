"""Depth-weighted averages: their start, the paper's sums in float64, the whole network."""

import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.errors import UserError
from helios_jax.evaluate import decoding
from helios_jax.memory import policy as policies
from helios_jax.memory import store, traced
from helios_jax.model import depth_average
from helios_jax.model.block import Block
from helios_jax.model.layers import RMSNorm
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import compiler_options
from helios_jax.parallel import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compilation')
NO_POLICY = config.Memory('none')
V, T = 61, 12
RESIDUAL = config.GMU(kind='residual', normalize_output='on')
MODEL = config.Model(
    vocab_size=V, num_layers=5, embed_dim=40, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=56,
    prefix='dense', period='dense_window,dense', window=4, compute_dtype='float32', gmu=RESIDUAL,
)  # fmt: skip
FORMS = ['1x1', '1x2', '3x1', '2x2']  # dilation and period


def network(form, memory=NO_POLICY, **changes):
    gmu = dataclasses.replace(changes.pop('gmu', RESIDUAL), dwa=form)
    return Transformer(dataclasses.replace(MODEL, gmu=gmu, **changes), memory)


def tokens_of(rows):
    tokens = np.random.default_rng(2).integers(0, V, (rows, T)).astype(np.int32)
    return jnp.asarray(tokens), jnp.tile(jnp.arange(T)[None], (rows, 1))


@functools.cache
def trained(form):
    """Variables of the network in which nothing is at its start."""
    return random_weights(abstract_variables(network(form)), seed=3)


def hidden(form, memory, params, tokens, positions):
    return network(form, memory).apply({'params': params}, tokens, positions)[0]


def loss_and_gradient(form, memory=NO_POLICY, mesh=None, forward=hidden):
    tokens = tokens_of(8)

    def loss(params):
        out = forward(form, memory, params, *tokens)
        return jnp.mean(jnp.square(out * jnp.arange(40.0).reshape(1, 1, 40)))

    run, params = jax.jit(jax.value_and_grad(loss)), trained(form)['params']
    if mesh is None:
        return run(params)
    with jax.set_mesh(meshes.make(mesh, jax.devices()[:8])):
        return run(params)


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-4 * np.abs(b).max())
    jax.tree.map(near, found[1], expected[1])


def averaged_by_hand(form, x, alpha, layers):
    """The paper's sums, with every output kept."""
    dilation, period = map(int, form.split('x'))
    outputs, alpha = [x], list(alpha)
    for i, layer in enumerate(layers, start=1):
        x = layer(x)
        outputs.append(x)
        if i % period == 0:
            taken = [j for j in range(i + 1) if (i - j) % dilation == 0]
            x = sum(alpha.pop(0) * outputs[j] for j in taken)
    assert not alpha
    return x


def by_hand(form, memory, params, tokens, positions):
    """Hidden states of the network, layer by layer."""
    model = network('off').model
    number = len(model.period_kinds)

    def layer(i, kind, x):
        own = params['prefix']['layer_0']
        if i > 0:
            stack = params['periods'][f'layer_{(i - 1) % number}']
            own = jax.tree.map(lambda w: w[(i - 1) // number], stack)
        return Block(model, kind).apply({'params': own}, x, i, positions, None)[0]

    layers = [partial(layer, *own) for own in enumerate(model.layer_kinds)]
    x_0 = params['embed']['w'][tokens]
    x = averaged_by_hand(form, x_0, params['depth_weights'], layers)
    return RMSNorm().apply({'params': params['final_norm']}, x, model.norm_eps)


@pytest.mark.parametrize(
    ('form', 'policy'), [(FORMS[-1], 'none'), *((form, 'full') for form in FORMS)], ids=str
)
def test_value_and_gradient_are_those_of_the_papers_sums(form, policy):
    """In float64, with small layers, as the memory system runs them."""
    model = network(form).model
    rng = np.random.default_rng(4)
    number = len(weights.averaged(model))
    sizes = {'w': (5, 7, 7), 'x_0': (2, 3, 7), 'alpha': (number,)}
    layer = lambda w, x: x + jnp.tanh(x @ w)

    def scanned(given, carried, index):
        (mine, alpha), (x, sums) = given, carried
        return depth_average.joined(model, sums, layer(mine, x), index, alpha), None

    def ours(w, x_0, alpha):
        actions = None if policy == 'none' else policies.actions(config.Memory(policy))
        alpha = depth_average.table(model, alpha)
        carried, _ = store.scan(
            [scanned], params=[w], x=depth_average.begun(x_0, alpha), scanned=[jnp.arange(5)],
            shared=alpha, table=actions, input_name='block_input',
        )  # fmt: skip
        return carried.x

    def theirs(w, x_0, alpha):
        return averaged_by_hand(form, x_0, alpha, [partial(layer, one) for one in w])

    with jax.enable_x64(True):
        arguments = [jnp.asarray(rng.normal(size=size)) for size in sizes.values()]
        cotangent = jnp.asarray(rng.normal(size=sizes['x_0']))

        def compared(function):
            value, vjp = jax.vjp(function, *arguments)
            return value, *vjp(cotangent)

        for a, b in zip(*(jax.jit(lambda f=f: compared(f))() for f in (ours, theirs)), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('policy', ['full', pytest.param('minimal', marks=pytest.mark.long)])
def test_a_layer_keeps_for_its_backward_pass_what_it_keeps_without_averages(policy):
    def kept(form):
        model = network(form, config.Memory(policy))
        shapes = nn.unbox(abstract_variables(model))['params']
        loss = lambda params, *tokens: model.apply({'params': params}, *tokens)[0].sum()
        return traced.saved(jax.make_jaxpr(jax.grad(loss))(shapes, *tokens_of(2)))

    without = kept('off')
    assert 'block_input' in {array.name for array in without}
    assert kept('1x1') == without


@pytest.mark.slow
def test_the_networks_layers_read_the_averages():
    found = loss_and_gradient('2x2', config.Memory('full', layers='unrolled'))
    assert_same(found, loss_and_gradient('2x2', forward=by_hand))
    assert (np.abs(found[1]['depth_weights']) > 1e-6).all()


@pytest.mark.parametrize(
    ('form', 'gmu'),
    [
        pytest.param(FORMS[0], config.GMU(), marks=pytest.mark.slow),
        *(pytest.param(form, RESIDUAL, marks=pytest.mark.long) for form in FORMS[1:]),
    ],
    ids=['convex', *map(str, FORMS[1:])],
)
def test_a_fresh_network_is_the_one_without_averages(form, gmu):
    tokens, positions = tokens_of(2)
    model = network(form, gmu=gmu, compute_dtype='bfloat16')
    fresh = lambda: nn.unbox(model.init(jax.random.key(5), tokens, positions))
    alpha = jax.jit(lambda: fresh()['params']['depth_weights'])()
    params = random_weights(abstract_variables(model), seed=3)['params'] | {'depth_weights': alpha}
    plain = network('off', gmu=gmu, compute_dtype='bfloat16')
    logits = []
    for network_, own in (
        (model, params),
        (plain, {n: w for n, w in params.items() if n != 'depth_weights'}),
    ):
        run = jax.jit(partial(network_.apply, method='logits'))
        logits.append(np.asarray(run({'params': own}, tokens, positions))[..., :V])
    assert logits[0].std() > 0.3
    np.testing.assert_array_equal(*logits)


def test_an_average_takes_each_kth_output_and_the_newest():
    def averaged(form):
        found = {}
        for number, output in weights.averaged(network(form).model):
            found.setdefault(number, []).append(output)
        return list(found.values())

    assert averaged('1x2') == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert averaged('3x2') == [[2], [1, 4]]
    assert averaged('5x5') == [[0, 5]]
    assert averaged('off') == []


@pytest.mark.parametrize(
    'sizes',
    [
        pytest.param({'data': 2, 'fsdp': 4}, marks=pytest.mark.slow),
        pytest.param({'fsdp': 2, 'context': 2, 'tensor': 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_does(sizes):
    memory = config.Memory('full')
    alone = loss_and_gradient('2x2', memory)
    assert_same(loss_and_gradient('2x2', memory, config.Mesh(**sizes)), alone)


@pytest.mark.long
def test_parts_and_unrolled_layers_compute_the_same():
    plain = loss_and_gradient('1x2')
    for memory in (config.Memory('full', backward_parts=2), config.Memory(layers='unrolled')):
        assert_same(loss_and_gradient('1x2', memory), plain)


@pytest.mark.slow
def test_decoding_with_a_cache_is_recomputation():
    model, variables = network('1x2'), trained('1x2')
    tokens, where = tokens_of(1)
    row = np.asarray(tokens)[0]
    run = jax.jit(partial(model.apply, method='logits'))
    whole = np.asarray(run(variables, tokens, where))[0, :, :V]
    assert whole.std() > 0.3
    logits, cache = decoding.prefill(model, variables, [row[:5].tolist()], 4)
    for t in range(5, T):
        np.testing.assert_allclose(logits[0, :V], whole[t - 1], rtol=2e-4, atol=2e-4)
        column = lambda x: np.full((1, 1), x, np.int32)
        logits, cache = decoding.extending(compiler_options.DECODING)(
            variables, cache, column(row[t]), column(t), column(1), model=model
        )
    np.testing.assert_allclose(logits[0, :V], whole[-1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'kind': 'hyper', 'dwa': '1x1'}, r"dwa='1x1', but kind='hyper' .*another kind, or off"),
        *(
            ({'dwa': no}, f'dwa={no!r} must be a dilation and a')
            for no in ('0x1', '4', 'x', '2x-1')
        ),
        ({'dwa': '1x6'}, "dwa='1x6': the period must be at most model.num_layers=5"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        dataclasses.replace(MODEL, gmu=config.GMU(**settings))
    assert '\n' not in str(caught.value)
