"""Stored functions: the same value, the same jaxpr, and a gradient that reads what was kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from helios_jax import config
from helios_jax.kernels import quantize
from helios_jax.memory import policy, store, traced
from helios_jax.memory.unrolled import unrolled, unrolls

B, D, F, L = 3, 6, 10, 4
NONE = dict.fromkeys(policy.NAMES, 'remat') | {'block_input': 'device'}


def block(given, x, scale, ids):
    """Two named tensors, one of them read twice, one inside a jit."""
    params, _ = given
    h = checkpoint_name(x @ params['up'], 'gate_up')
    out = jax.jit(lambda h: checkpoint_name(jnp.sin(h) * h, 'mlp_update'))(h)
    return x + scale * jnp.where(ids[:, None] > 0, jnp.tanh(out) @ params['down'], 0), h.sum()


@pytest.fixture
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        'up': jax.random.normal(keys[0], (L, D, F)) * D**-0.5,
        'down': jax.random.normal(keys[1], (L, F, D)) * F**-0.5,
    }
    x = jax.random.normal(keys[2], (B, D))
    return params, x, 1 + jnp.arange(L) / 7, jnp.asarray([1, 0, 2])


def plain(params, x, scales, ids):
    def step(x, parts):
        return block((parts[0], None), x, parts[1], ids)

    return jax.lax.scan(step, x, (params, scales))


def stored(table, params, x, scales, ids, run=store.scan):
    x, reports = run(
        [block], table=table, params=[params], x=x, scanned=[scales], others=(ids,),
        input_name='block_input',
    )  # fmt: skip
    return x, reports[0]


def loss_of(run):
    def loss(params, x, scales, ids):
        x, reports = run(params, x, scales, ids)
        return jnp.sum(jnp.cos(x)) + jnp.sum(reports**2)

    return loss


TABLES = {
    'nothing': {},
    'device': {'gate_up': 'device', 'mlp_update': 'device'},
    'offload': {'gate_up': 'offload', 'block_input': 'offload'},
    'fp8': {'gate_up': 'fp8', 'mlp_update': 'int8', 'block_input': 'fp8+offload'},
}


@pytest.mark.parametrize('table', TABLES.values(), ids=TABLES)
def test_value_is_the_functions_own(table, arguments):
    run = lambda *args: stored(NONE | table, *args)
    for got, expected in zip(jax.jit(run)(*arguments), jax.jit(plain)(*arguments), strict=True):
        np.testing.assert_array_equal(got, expected)
    value, _ = jax.jit(jax.value_and_grad(loss_of(run), argnums=(0, 1)))(*arguments)
    np.testing.assert_allclose(value, loss_of(plain)(*arguments), rtol=1e-6)


@pytest.mark.parametrize('name', ['nothing', 'device', 'offload'])
def test_actions_that_keep_every_bit_keep_the_gradient(name, arguments):
    run = lambda *args: stored(NONE | TABLES[name], *args)
    got = jax.jit(jax.grad(loss_of(run), argnums=(0, 1)))(*arguments)
    expected = jax.jit(jax.grad(loss_of(plain), argnums=(0, 1)))(*arguments)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=2e-5, atol=1e-6), got, expected)


def test_the_gradient_is_of_the_function_at_the_restored_tensors(arguments):
    """One layer, one name: what a plain vjp gives where the tensor is replaced by its rounding."""
    params, x, *_ = arguments
    up = params['up'][0]
    run = lambda up: store.apply(
        lambda up, x: jnp.sin(checkpoint_name(x @ up, 'gate_up')),
        table=NONE | {'gate_up': 'fp8'}, params=up, x=x, input_name='block_input',
    ).sum()  # fmt: skip
    rounded = quantize.dequantize(quantize.store(x @ up, 'fp8'), 'float32')
    expected = x.T @ jnp.cos(rounded)
    np.testing.assert_allclose(jax.grad(run)(up), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - x.T @ jnp.cos(x @ up)).max() > 1e-4


def error(depth: int) -> float:
    """Share by which the gradient of the topmost layer is off that `depth` layers lie below."""
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        'up': jax.random.normal(keys[0], (depth, D, F)) * D**-0.5,
        'down': jax.random.normal(keys[1], (depth, F, D)) * F**-0.5,
    }
    given = params, jax.random.normal(keys[2], (B, D)), jnp.ones(depth), jnp.asarray([1, 3, 2])
    got = jax.jit(jax.grad(loss_of(lambda *a: stored(NONE | TABLES['fp8'], *a))))(*given)
    expected = jax.jit(jax.grad(loss_of(plain)))(*given)
    top = [(got[name][-1], e[-1]) for name, e in expected.items()]
    return float(max(jnp.linalg.norm(g - e) / jnp.linalg.norm(e) for g, e in top))


@pytest.mark.slow
def test_errors_do_not_compound_with_depth():
    """Every layer's tensors are those of the exact forward pass, rounded once.

    Were they those of a rounded pass, the top layer's would be off by the rounding of all below.
    """
    shallow, deep = error(2), error(32)
    assert 1e-3 < shallow < 0.1
    assert deep < 1.5 * shallow


def arrays(run, *args):
    return traced.saved(jax.jit(jax.grad(loss_of(run), argnums=(0, 1))).trace(*args).jaxpr)


def test_what_is_stored_is_what_the_table_says_and_weights_are_not(arguments):
    table = NONE | {'gate_up': 'fp8', 'block_input': 'device'}
    found = arrays(lambda *args: stored(table, *args), *arguments)
    assert {(a.name, a.dtype, a.shape, a.layers) for a in found} == {
        ('block_input', 'float32', (B, D), L),
        ('gate_up', 'uint8', (B, F), L),
        ('gate_up', 'int8', (B,), L),
    }
    # Payload and exponents: a byte a value and one more a row.
    assert sum(a.num_bytes for a in found if a.name == 'gate_up') == L * B * (F + 1)


def test_a_tensor_that_two_consumers_read_is_stored_once(arguments):
    table = NONE | {'gate_up': 'device'}
    names = [a.name for a in arrays(lambda *args: stored(table, *args), *arguments)]
    assert sorted(names) == ['block_input', 'gate_up']


def test_what_backward_does_not_read_is_not_stored():
    def linear(params, x):
        # Of a sum, the gradient reads nothing.
        return x + checkpoint_name(x @ params, 'mlp_update'), None

    table = NONE | {'mlp_update': 'device'}
    run = lambda p, x: store.scan(
        [lambda p, x, _: linear(p[0], x)], table=table, params=[p], x=x, scanned=[()],
        input_name='block_input',
    )[0].sum()  # fmt: skip
    params, x = jnp.ones((L, D, D)), jnp.ones((B, D))
    found = traced.saved(jax.jit(jax.grad(run)).trace(params, x).jaxpr)
    assert [a.name for a in found] == ['block_input']


def test_integers_and_what_has_no_name_stay_as_they_are():
    def route(params, x):
        _, choices = jax.lax.top_k(x, 2)
        choices = checkpoint_name(choices, 'router_choices')
        return jnp.take_along_axis(x * params[None], choices, axis=-1).sum()

    table = NONE | {'router_choices': 'device', 'block_input': 'int8'}
    run = lambda p, x: store.apply(route, table=table, params=p, x=x, input_name='block_input')
    found = traced.saved(jax.jit(jax.grad(run)).trace(jnp.ones(D), jnp.ones((B, D))).jaxpr)
    # The payload is int8, and so are the exponents.
    assert {(a.name, a.dtype) for a in found} == {
        ('router_choices', 'int32'),
        ('block_input', 'int8'),
    }


def test_a_layer_outside_a_scan_quantises_where_it_stores():
    """XLA may else keep the value, and quantise it where the backward pass reads it."""
    table = NONE | {'block_input': 'fp8'}
    run = lambda p, x: store.apply(
        lambda p, x: jnp.sin(x @ p).sum(), table=table, params=p, x=x, input_name='block_input'
    )
    text = jax.jit(jax.grad(run)).lower(jnp.ones((D, F)), jnp.ones((B, D))).as_text()
    held = [line for line in text.splitlines() if 'optimization_barrier' in line]
    # Once where it is stored, and once more with the gradient that meets it.
    assert [line.count(f'tensor<{B}x{D}xui8>, tensor<{B}xi8>') for line in held] == [1, 1], held


@pytest.mark.parametrize('run', [store.apply, unrolled])
def test_without_a_loop_what_is_computed_again_is_not_what_was_computed(run):
    """XLA would find it computed already, and keep it: then nothing is saved but time."""
    one = lambda p, x, *_: (jnp.sin(x @ jax.tree.leaves(p)[0]), None)
    given = {'table': NONE, 'x': jnp.ones((B, D)), 'input_name': 'block_input'}
    if run is unrolled:
        loss = lambda p: unrolled([one], params=[p], scanned=[()], **given)[0].sum()
    else:
        loss = lambda p: store.apply(one, params=p[0], **given)[0].sum()
    text = jax.jit(jax.grad(loss)).lower(jnp.ones((L, D, D))).as_text()
    held = [line for line in text.splitlines() if 'optimization_barrier' in line]
    # A layer's input and the gradient of its output pass together.
    assert len(held) == (L if run is unrolled else 1)
    assert all(line.count(f'tensor<{B}x{D}xf32>') == 2 for line in held)


@pytest.mark.parametrize(
    'table',
    [
        TABLES[name] if name == 'fp8'
        else pytest.param(None, marks=pytest.mark.slow) if name == 'none'
        else pytest.param(TABLES[name], marks=pytest.mark.slow)
        for name in ('none', *TABLES)
    ],
    ids=['none', *TABLES],
)  # fmt: skip
def test_unrolled_layers_compute_what_scanned_ones_do(table, arguments):
    """Forward to the bit; gradients of weights and input as near as XLA's rounding."""
    full = None if table is None else NONE | table
    runs = [lambda *args, run=run: stored(full, *args, run=run) for run in (store.scan, unrolled)]
    for one, other in zip(*(jax.jit(run)(*arguments) for run in runs), strict=True):
        np.testing.assert_array_equal(one, other)
    gradients = [jax.jit(jax.grad(loss_of(run), argnums=(0, 1)))(*arguments) for run in runs]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_unrolled_layers_save_what_scanned_ones_do_and_stack_nothing(arguments):
    table = NONE | {'gate_up': 'device', 'block_input': 'fp8+offload'}
    run = lambda *args: stored(table, *args, run=unrolled)
    traced_step = jax.jit(jax.grad(loss_of(run))).trace(*arguments)
    found = [(a.name, a.shape, a.layers) for a in traced.saved(traced_step.jaxpr)]
    payloads = [(name, shape) for name, shape, _ in found if shape in ((B, D), (B, F))]
    assert sorted(payloads) == sorted([('block_input', (B, D)), ('gate_up', (B, F))] * L)
    assert 'while' not in traced_step.lower().as_text()


@pytest.mark.parametrize(
    'table', [None, NONE, NONE | TABLES['offload']], ids=['none', 'full', 'offload']
)
@pytest.mark.parametrize('run', [store.scan, unrolled])
def test_what_layers_share_is_stored_by_none_and_has_the_sum_of_their_gradients(
    run, table, arguments
):
    params, x, scales, ids = arguments
    shared = jax.random.normal(jax.random.key(5), (B, D))

    def layer(given, x, scale, ids):
        x, report = block(given, x, scale, ids)
        return x + jnp.tanh(scale * given[1]), report

    def loss(shared):
        out, _ = run(
            [layer], table=table, params=[params], shared=shared, x=x, scanned=[scales],
            others=(ids,), input_name='block_input',
        )  # fmt: skip
        return jnp.sum(jnp.cos(out))

    def one_by_one(shared):
        out = x
        for n in range(L):
            mine = {name: weight[n] for name, weight in params.items()}
            out, _ = layer((mine, shared), out, scales[n], ids)
        return jnp.sum(jnp.cos(out))

    gradient, expected = jax.jit(jax.grad(loss))(shared), jax.grad(one_by_one)(shared)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-5)
    if table is not None:
        found = {a.name for a in traced.saved(jax.jit(jax.grad(loss)).trace(shared).jaxpr)}
        assert found <= {'block_input', 'gate_up', 'mlp_update'}


@pytest.mark.parametrize(
    ('in_turn', 'stacks', 'layers'), [(store.scan, 1, L // 2), (unrolled, L // 2, 0)]
)
def test_two_functions_take_turns(in_turn, stacks, layers, arguments):
    """A period of two layers: each recomputed on its own."""
    params, x, scales, ids = arguments
    even, odd = (jax.tree.map(lambda a, i=i: a[i::2], (params, scales)) for i in range(2))

    def run(even, odd, x):
        table = NONE | {'gate_up': 'device', 'block_input': 'fp8+offload'}
        x, reports = in_turn(
            [block, block], table=table, params=[even[0], odd[0]], x=x,
            scanned=[even[1], odd[1]], others=(ids,), input_name='block_input',
        )  # fmt: skip
        return x, jnp.stack(reports, axis=1).reshape(-1)

    for got, expected in zip(run(even, odd, x), plain(*arguments), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda params: run((params, even[1]), odd, x)[0].sum()))
    found = sorted((a.name, a.layers) for a in traced.saved(gradient.trace(even[0]).jaxpr))
    own = [('block_input', layers)] * 4 * stacks + [('gate_up', layers)] * 2 * stacks
    assert found == own


def test_nan_infinity_and_zero_survive_storage():
    x = jnp.asarray([[1.0, -jnp.inf, 2.0], [0.0, 0.0, 0.0], [1.0, jnp.nan, 2.0], [3.0, 4.0, 5.0]])
    run = lambda p: store.apply(
        lambda p, x: p * x, table=NONE | {'block_input': 'fp8'}, params=p, x=x,
        input_name='block_input',
    ).sum()  # fmt: skip
    lost, zero, lost_too, kept = jax.grad(run)(jnp.ones_like(x)).sum(axis=1)
    assert np.isnan(lost) and np.isnan(lost_too)
    assert zero == 0
    np.testing.assert_allclose(kept, 12.0, rtol=2**-4)


@pytest.mark.parametrize(
    ('changes', 'platform', 'expected'),
    [
        ({}, 'gpu', True),
        ({}, 'tpu', False),
        ({}, '', False),
        ({'memory.layers': 'unrolled'}, 'tpu', True),
        ({'memory.layers': 'scan'}, 'gpu', False),
        ({'model.num_layers': 65}, 'gpu', False),
        ({'memory.optimizer': 'host'}, 'gpu', False),
        ({'model.period': 'dense,moe', 'model.moe.num_experts': 4}, 'gpu', False),
    ],
)
def test_auto_unrolls_a_few_dense_layers_on_a_gpu(changes, platform, expected):
    cfg = config.replace(config.Config(), changes)
    assert unrolls(cfg.memory, cfg.model, platform) == expected
