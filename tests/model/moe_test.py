"""The mixture of experts against a loop over tokens and experts in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import config
from helios_jax.model.moe import MixtureOfExperts, SwiGLU, route
from helios_jax.parallel import mesh as meshes

B, T, D, E, X, F = 8, 6, 12, 4, 3, 10
MOE = config.MoE(num_experts=E, num_experts_per_token=X, mlp_dim=F, scale=1.7)
CASES = {
    'softmax': {},
    'sigmoid': {'scores': 'sigmoid'},
    'top_one_sigmoid': {'scores': 'sigmoid', 'num_experts_per_token': 1},
    'all': {'num_experts_per_token': E},
    'shared': {'num_shared_experts': 2},
    'not_renormalized': {'renormalize': False},
    'tight': {'capacity_factor': 0.8},
    'roomy': {'capacity_factor': 4.0},
    'tight_shared_sigmoid': {'capacity_factor': 0.5, 'num_shared_experts': 1, 'scores': 'sigmoid'},
}
SLOW = ('tight_shared_sigmoid', 'not_renormalized', 'softmax', 'all', 'roomy')


def model(**changes):
    moe = dataclasses.replace(MOE, **changes)
    return config.Model(
        vocab_size=3,
        embed_dim=D,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        mlp_dim=7,
        period='moe',
        moe=moe,
    )


def tokens(dtype=np.float32):
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(dtype)


def segment_ids():
    """The last tokens of some rows are padding; one row is nothing else."""
    return (np.arange(T)[None] < np.array([6, 3, 6, 0, 1, 5, 6, 4])[:, None]).astype(np.int32)


def build(random_variables, **changes):
    module = MixtureOfExperts(model(**changes))
    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    variables = random_variables(module, x, None, seed=1)
    # Enough to change who is chosen.
    variables['router']['bias'] = jnp.asarray([0.3, -0.2, 0.1, -0.1])
    variables['params']['router']['w'] *= 3
    return module, variables


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def choose(moe, scores, bias, real):
    """Whether a token chose an expert, and whether it found room there, by a loop over tokens."""
    capacity = np.ceil(moe.capacity_factor * B * T * moe.num_experts_per_token / E) or np.inf
    chosen, kept = np.zeros((B, T, E), bool), np.zeros((B, T, E), bool)
    for b, t in np.argwhere(real):
        order = sorted(range(E), key=lambda e: (-(scores[b, t, e] + bias[e]), e))
        for e in order[: moe.num_experts_per_token]:
            kept[b, t, e] = kept[..., e].sum() < capacity
            chosen[b, t, e] = True
    return chosen, kept


def loop(moe, variables, x, real):
    """Output and statistics, one expert after another over all tokens."""
    p = variables['params']
    logits = x @ p['router']['w']
    scores = jax.nn.softmax(logits, axis=-1) if moe.scores == 'softmax' else jax.nn.sigmoid(logits)
    bias = np.asarray(variables['router']['bias'])
    chosen, kept = choose(moe, np.asarray(jax.lax.stop_gradient(scores)), bias, real)
    total = jnp.sum(scores, axis=-1, keepdims=True, where=chosen) if moe.renormalize else 1.0
    weights = moe.scale * scores / jnp.where(real[..., None], total, 1)
    y = jnp.zeros_like(x)
    for e in range(E):
        out = swiglu(x, p['gate']['w'][e], p['up']['w'][e], p['down']['w'][e])
        y = y + jnp.where(kept[..., [e]], weights[..., [e]] * out, 0)
    if moe.num_shared_experts:
        y = y + swiglu(x, *(p['shared'][name]['w'] for name in ('gate', 'up', 'down')))
    mean = lambda a: a[real].mean(axis=0)
    shares = scores / scores.sum(-1, keepdims=True)
    load = chosen.sum((0, 1))
    return y, {
        'load': load,
        'dropped': (chosen & ~kept).sum(),
        'entropy': mean(-(shares * jnp.log(shares)).sum(-1)),
        'balance_loss': E * jnp.sum(load / load.sum() * mean(shares)),
        'z_loss': mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
    }


def objective(y, stats, real):
    """Something that every output contributes to, the router's losses included."""
    weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * real[..., None]
    return jnp.sum(y * weight) + 0.7 * stats['balance_loss'] + 0.3 * stats['z_loss']


@pytest.mark.parametrize(
    'case',
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('top_one_sigmoid', *SLOW)),
        # What the first of these has together.
        *(pytest.param(name, marks=pytest.mark.long) for name in ('tight', 'sigmoid', 'shared')),
    ],
)
def test_equals_a_loop_over_experts_in_float64(case, random_variables):
    module, variables = build(random_variables, **CASES[case])
    moe, ids = module.model.moe, segment_ids()
    real = ids > 0

    def ours(params, x):
        y, stats = module.apply(variables | {'params': params}, x, jnp.asarray(ids))
        return objective(y, stats._asdict(), real), (y, stats._asdict())

    def theirs(params, x):
        y, stats = loop(moe, variables | {'params': params}, x, real)
        return objective(y, stats, real), (y, stats)

    with jax.enable_x64(True):
        variables = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), variables)
        arguments = variables['params'], jnp.asarray(tokens(np.float64))
        run = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)
        (_, (y, stats)), gradients = jax.jit(run)(*arguments)
        run = jax.value_and_grad(theirs, argnums=(0, 1), has_aux=True)
        (_, (expected, expected_stats)), expected_gradients = run(*arguments)

        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
        for name, value in expected_stats.items():
            np.testing.assert_allclose(stats[name], value, rtol=1e-6, err_msg=name)
        jax.tree.map(
            # The load that the balance loss reads is float32.
            lambda g, e: np.testing.assert_allclose(g, e, rtol=0, atol=1e-8),
            gradients,
            expected_gradients,
        )
    if not moe.num_shared_experts:
        assert not np.asarray(y)[~real].any()
    assert stats['load'].sum() == real.sum() * moe.num_experts_per_token
    assert (stats['dropped'] > 0) == case.startswith('tight')
    assert len({*np.asarray(stats['load'])}) > 1 or case == 'all'
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(np.asarray(gradient)).max() > 1e-3, jax.tree_util.keystr(path)


def test_one_expert_is_the_dense_layer(random_variables):
    """Forward and gradients; the router has nothing to say."""
    moe = MixtureOfExperts(model(num_experts=1, num_experts_per_token=1, scale=1.0))
    dense = SwiGLU(model(), F)
    x = jnp.asarray(tokens())
    variables = random_variables(dense, x)

    def mixture(variables, x):
        params = {name: {'w': part['w'][None]} for name, part in variables['params'].items()}
        params['router'] = {'w': jnp.ones((D, 1))}
        return moe.apply({'params': params, 'router': {'bias': jnp.zeros(1)}}, x, None)[0]

    actual, expected = (
        jax.jit(
            lambda v, x, f=f: (f(v, x), jax.grad(lambda *a: jnp.sum(f(*a) ** 3), (0, 1))(v, x))
        )(variables, x)
        for f in (mixture, dense.apply)
    )
    assert np.abs(expected[0]).max() > 0.2
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * np.abs(e).max()),
        actual, expected,
    )  # fmt: skip


@pytest.mark.parametrize('scores', ['softmax', 'sigmoid'])
def test_ties_go_to_the_lower_index_and_weights_ignore_the_bias(scores):
    moe = dataclasses.replace(MOE, num_experts=6, scores=scores, scale=1.7)
    logits = jnp.asarray([[[1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [0.0] * 6]])
    choices, weights, all_scores = route(logits, jnp.zeros(6), moe)
    np.testing.assert_array_equal(choices, [[[1, 3, 0], [0, 1, 2]]])
    # A bias that lifts the last expert over all others moves the choice, not the weight.
    choices, weights, _ = route(logits, jnp.asarray([0, 0, 0, 0, 0, 9.0]), moe)
    np.testing.assert_array_equal(choices, [[[5, 1, 3], [5, 0, 1]]])
    chosen = np.take_along_axis(np.asarray(all_scores), np.asarray(choices), axis=-1)
    np.testing.assert_allclose(weights, 1.7 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-6)


def test_balance_loss_is_one_for_an_even_router(random_variables):
    module, variables = build(random_variables, num_experts_per_token=E)
    variables['params']['router']['w'] *= 0
    _, stats = jax.jit(module.apply)(variables, jnp.asarray(tokens()), None)
    np.testing.assert_allclose(stats.balance_loss, 1, rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, np.log(E), rtol=1e-5)
    np.testing.assert_allclose(stats.z_loss, np.log(E) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(stats.load, np.full(E, B * T))


def test_padding_changes_nothing_for_the_others(random_variables):
    """Neither its values nor its number, except that capacity is a share of all slots."""
    module, variables = build(random_variables)
    x, ids = tokens(), segment_ids()
    run = jax.jit(module.apply)
    first, stats = run(variables, jnp.asarray(x), jnp.asarray(ids))
    changed = np.where(ids[..., None] > 0, x, 100 - 7 * x).astype(np.float32)
    second, changed_stats = run(variables, jnp.asarray(changed), jnp.asarray(ids))
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, stats, changed_stats)


MESHES = [
    {'expert': 4, 'tensor': 2},  # one expert group
    {'expert': 2, 'tensor': 2, 'data': 2},
    {'expert': 2, 'context': 2, 'fsdp': 2},
]


@pytest.mark.slow
@pytest.mark.parametrize('case', ['softmax', 'tight_shared_sigmoid'])
def test_split_over_a_mesh_equals_one_device(case, random_variables):
    module, variables = build(random_variables, **CASES[case])
    ids = jnp.asarray(segment_ids())

    def run(params, x):
        y, stats = module.apply(variables | {'params': params}, x, ids)
        return objective(y, stats._asdict(), ids > 0), (y, stats)

    run = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    arguments = variables['params'], jnp.asarray(tokens())
    expected = jax.jit(run)(*arguments)
    # A capacity is a share of one expert group's tokens: only a single group drops the same.
    sizes = MESHES[:1] if module.model.moe.capacity_factor else MESHES
    for size in sizes:
        with jax.set_mesh(meshes.make(config.Mesh(**({'fsdp': 1} | size)))):
            actual = jax.jit(lambda *arguments: run(*arguments))(*arguments)
        jax.tree.map(
            lambda a, e, size=size: np.testing.assert_allclose(
                a, e, rtol=1e-5, atol=3e-5, err_msg=str(size)
            ),
            actual,
            expected,
        )


@pytest.mark.slow
def test_every_group_counts_its_own_drops(random_variables):
    """Capacity 0.5 of two groups that each hold half of the rows."""
    module, variables = build(random_variables, capacity_factor=0.5)
    x, ids = jnp.asarray(tokens()), jnp.ones((B, T), jnp.int32)
    run = jax.jit(module.apply)
    halves = [run(variables, x[rows], ids[rows]) for rows in (slice(4), slice(4, 8))]
    with jax.set_mesh(meshes.make(config.Mesh(fsdp=2, expert=4))):
        y, stats = jax.jit(module.apply)(variables, x, ids)
    np.testing.assert_allclose(y, np.concatenate([half[0] for half in halves]), atol=1e-5)
    assert stats.dropped == sum(half[1].dropped for half in halves)
    np.testing.assert_array_equal(stats.load, sum(half[1].load for half in halves))
    assert stats.dropped >= B * T * X / 2
