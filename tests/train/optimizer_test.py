import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from helios_jax import config
from helios_jax.errors import UserError
from helios_jax.train import optimizer

pytestmark = pytest.mark.usefixtures('quick_compilation')

L, D, N, K, H, F, E, V, R = 2, 12, 3, 1, 4, 10, 5, 14, 7
LEAVES = {  # name: axes, shape, decay, Muon's rows and columns
    'embedding': (('vocab', 'embed'), (V, D), False, None),
    'unembedding': (('stream', 'unembed_vocab'), (D, V), False, None),
    'final_norm': (('norm',), (D,), False, None),
    'first_q': (('embed', 'heads', 'head_dim'), (D, N, H), True, ((0,), (1, 2))),
    'q': (('layers', 'embed', 'heads', 'head_dim'), (L, D, N, H), True, ((1,), (2, 3))),
    'k': (('layers', 'embed', 'kv_heads', 'head_dim'), (L, D, K, H), True, ((1,), (2, 3))),
    'out': (('layers', 'heads', 'head_dim', 'embed'), (L, N, H, D), True, ((1, 2), (3,))),
    'up': (('layers', 'embed', 'mlp'), (L, D, F), True, ((1,), (2,))),
    'down': (('layers', 'layers', 'mlp', 'embed'), (L, 3, F, D), True, ((2,), (3,))),
    'expert': (('layers', 'experts', 'mlp', 'embed'), (L, E, F, D), True, ((2,), (3,))),
    'router': (('layers', 'embed', 'experts'), (L, D, E), True, None),
    'norm': (('layers', 'norm'), (L, D), False, None),
    'gate_in': (('layers', 'embed', 'gate'), (L, D, R), False, None),
    'gate_out': (('layers', 'gate', 'gate_embed'), (L, R, D), False, None),
    'gate_bias': (('layers', 'gate_embed'), (L, D), False, None),
}
AXES = {'model': {name: leaf[0] for name, leaf in LEAVES.items()}}
NAMES = ('adamw', 'muon')


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.standard_normal(shape, np.float32)
    return {'model': {name: draw(leaf[1]) for name, leaf in LEAVES.items()}}


@functools.cache
def first_update(name: str, weight_decay: float = 0.0) -> dict:
    """The update of parameters tree(0) by gradients tree(1), with learning rate 0.5."""
    settings = plain(name=name, learning_rate=0.5, weight_decay=weight_decay)
    tx = optimizer.make(settings, 9, AXES)
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(tree(1), tree(0))['model']


@jax.jit
def muon_alone(gradient: jax.Array) -> jax.Array:
    """Optax's Muon of one 2-D weight, which it takes as it is, with learning rate 0.5."""
    tx = optax.contrib.muon(0.5, consistent_rms=0.2)
    return tx.update({'w': gradient}, tx.init({'w': gradient}), {'w': gradient})[0]['w']


def plain(**settings) -> config.Optimizer:
    """Constant learning rate 1, no decay, no clipping, except as said."""
    settings = {'warmup_steps': 0, 'final_fraction': 1.0, 'learning_rate': 1.0} | settings
    return config.Optimizer(**({'weight_decay': 0.0, 'clip_norm': 0.0} | settings))


@pytest.mark.parametrize('name', NAMES)
def test_every_parameter_has_the_rule_of_its_axes(name):
    table = {r.name: r for r in optimizer.rules(config.Optimizer(name=name), AXES, tree(0))}
    assert set(table) == {f'model.{leaf}' for leaf in LEAVES}
    for leaf, (axes, shape, decay, sides) in LEAVES.items():
        rule = table[f'model.{leaf}']
        muon = name == 'muon' and sides is not None
        assert (rule.axes, rule.shape, rule.decay) == (axes, shape, decay)
        assert rule.optimizer == ('muon' if muon else 'adamw')
        assert rule.rows == (tuple(axes[i] for i in sides[0]) if muon else ())
        assert rule.columns == (tuple(axes[i] for i in sides[1]) if muon else ())


@pytest.mark.parametrize('name', ['adamw', pytest.param('muon', marks=pytest.mark.slow)])
def test_decay_changes_exactly_the_matrices_and_by_its_rate(name):
    with_decay, without = first_update(name, 0.3), first_update(name)
    for leaf, (_, _, decays, _) in LEAVES.items():
        change = with_decay[leaf] - without[leaf]
        expected = -0.5 * 0.3 * tree(0)['model'][leaf] if decays else 0 * change
        np.testing.assert_allclose(change, expected, atol=1e-6)


@pytest.mark.parametrize('leaf', [name for name, spec in LEAVES.items() if spec[3]])
def test_muon_orthogonalises_each_layer_and_expert_with_all_heads_together(leaf):
    update = np.asarray(first_update('muon')[leaf])
    rows, columns = LEAVES[leaf][3]
    num_rows = math.prod(update.shape[i] for i in rows)
    num_columns = math.prod(update.shape[i] for i in columns)
    stacked = update.reshape(-1, num_rows, num_columns)
    alone = tree(1)['model'][leaf].reshape(stacked.shape)
    for matrix, gradient in zip(stacked, alone, strict=True):
        np.testing.assert_allclose(matrix, muon_alone(gradient), atol=2e-5)
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.1 * max(matrix.shape) ** 0.5)
        assert singular.min() > 0.3 and singular.max() < 1.3
    raw = np.linalg.svd(alone[0], compute_uv=False)
    assert min(alone[0].shape) == 1 or raw.max() / raw.min() > 1.5


def test_muon_leaves_the_other_parameters_to_adamw():
    for leaf, (*_, sides) in LEAVES.items():
        same = np.array_equal(first_update('adamw')[leaf], first_update('muon')[leaf])
        assert same == (sides is None)


def test_embed_between_the_other_axes_is_refused():
    with pytest.raises(ValueError, match='between'):
        optimizer.muon_dimensions(('heads', 'embed', 'head_dim'))


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match='hidden'):
        optimizer.rules(config.Optimizer(), {'w': ('embed', 'hidden')}, {'w': jnp.ones((3, 5))})


def test_experts_of_the_router_are_its_columns_not_a_batch():
    assert optimizer.muon_dimensions(('layers', 'embed', 'experts')) is None
    assert optimizer.muon_dimensions(('experts', 'embed', 'mlp')) == MuonDimensionNumbers(
        (1,), (2,)
    )


def test_cosine_at_its_corners():
    settings = config.Optimizer(learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    rate = optimizer.schedule(settings, 110)
    np.testing.assert_allclose(
        [rate(n) for n in (0, 4, 9, 59, 109, 200)], [0.2, 1, 2, 1.1, 0.2, 0.2], rtol=1e-6
    )


def test_wsd_at_its_corners():
    settings = config.Optimizer(
        learning_rate=2.0, warmup_steps=10, schedule='wsd', decay_fraction=0.25, final_fraction=0.5
    )
    rate = optimizer.schedule(settings, 200)
    np.testing.assert_allclose(
        [rate(n) for n in (0, 4, 9, 149, 150, 174, 199)],
        [0.2, 1, 2, 2, 1.98, 1.5, 1],
        rtol=1e-6,
    )


@pytest.mark.parametrize('final', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ('shape', 'decay'), [('cosine', 0.5), ('wsd', 0.0), ('wsd', 0.2), ('wsd', 1.0)]
)
@pytest.mark.parametrize('warmup', [0, 1, 7, 28, 29, 200])
@pytest.mark.parametrize('num_steps', [2, 29])
def test_the_rate_rises_from_above_0_to_the_peak_and_the_last_update_takes_the_final_one(
    num_steps, warmup, shape, decay, final
):
    settings = config.Optimizer(
        learning_rate=3e-3,
        warmup_steps=warmup,
        schedule=shape,
        decay_fraction=decay,
        final_fraction=final,
    )
    rates = jax.vmap(optimizer.schedule(settings, num_steps))(jnp.arange(num_steps + 5))
    peak, last = 3e-3, num_steps - 1
    np.testing.assert_allclose(rates[last:], peak * final, rtol=1e-6)  # 0 is exactly 0
    rising = min(max(1, warmup), last)
    up = peak * np.arange(1, rising + 1) / max(1, warmup)
    np.testing.assert_allclose(rates[:rising], up, rtol=0, atol=1e-6 * peak)
    if warmup < num_steps:
        assert rates.max() == pytest.approx(peak)
        assert (np.diff(rates[rising - 1 :]) <= 1e-9).all()
    if shape == 'wsd' and warmup < num_steps:
        falling = max(1, min(round(decay * num_steps), num_steps - max(1, warmup)))
        np.testing.assert_allclose(rates[rising - 1 : -falling - 5], peak, rtol=1e-6)
        down = peak * (final + (1 - final) * np.arange(falling)[::-1] / falling)
        np.testing.assert_allclose(rates[-falling - 5 : -5], down, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize('shape', ['cosine', 'wsd'])
def test_the_only_update_of_a_run_is_its_last(shape):
    settings = config.Optimizer(learning_rate=2.0, schedule=shape, final_fraction=0.3)
    assert optimizer.schedule(settings, 1)(0) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ('dtype', 'name'),
    [
        ('float32', 'adamw'),
        pytest.param('bfloat16', 'muon', marks=pytest.mark.slow),
        pytest.param('bfloat16', 'adamw', marks=pytest.mark.slow),
        pytest.param('float32', 'muon', marks=pytest.mark.slow),
    ],
)
def test_every_moment_is_stored_as_asked_and_counts_are_not(name, dtype):
    params = tree(0)
    tx = optimizer.make(plain(name=name, moments_dtype=dtype), 9, AXES)
    _, state = jax.jit(tx.update)(tree(1), tx.init(params), params)
    for each in (tx.init(params), state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(each):
            if leaf.ndim and 'ns_coeffs' not in str(path):
                assert leaf.dtype == dtype, path
            else:
                assert leaf.dtype in (jnp.int32, jnp.float32), path
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1 or x.size == D)
    sizes = {leaf: math.prod(spec[1]) for leaf, spec in LEAVES.items()}
    single = sum(n for leaf, n in sizes.items() if name == 'muon' and LEAVES[leaf][3])
    assert moments == 2 * sum(sizes.values()) - single


def test_bfloat16_moments_round_the_stored_value_and_nothing_else():
    params = {'w': jnp.zeros((3,))}
    tx = optimizer.make(plain(moments_dtype='bfloat16'), 9, {'w': ('norm',)})
    first, second = {'w': jnp.array([0.3, -1.7, 5.1])}, {'w': jnp.array([1.1, 0.2, -0.7])}
    _, state = tx.update(first, tx.init(params), params)
    update, _ = tx.update(second, state, params)
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float32)
    mu = 0.9 * rounded(0.1 * first['w']) + 0.1 * np.asarray(second['w'])
    nu = 0.95 * rounded(0.05 * first['w'] ** 2) + 0.05 * np.asarray(second['w']) ** 2
    expected = -(mu / (1 - 0.9**2)) / (np.sqrt(nu / (1 - 0.95**2)) + 1e-8)
    np.testing.assert_allclose(update['w'], expected, rtol=1e-5)


def test_decay_that_bfloat16_rounds_away_is_refused():
    with pytest.raises(UserError, match='beta2'):
        optimizer.make(config.Optimizer(moments_dtype='bfloat16', beta2=0.999), 9, AXES)


def test_clipping_bounds_the_global_norm():
    params, gradients = {'w': jnp.zeros((2,))}, {'w': jnp.array([30.0, 40.0])}
    states = []
    for scale in (1.0, 0.1, 1e-4):
        tx = optimizer.make(plain(clip_norm=5.0), 9, {'w': ('norm',)})
        scaled = jax.tree.map(lambda g, s=scale: g * s, gradients)
        states.append(tx.update(scaled, tx.init(params), params)[1])
    mu = [optax.tree.get(state, 'mu')['w'] for state in states]
    np.testing.assert_allclose(mu[0], [0.3, 0.4], rtol=1e-6)  # 0.1 · 5 · (0.6, 0.8)
    np.testing.assert_allclose(mu[1], mu[0], rtol=1e-6)
    np.testing.assert_allclose(mu[2], [3e-4, 4e-4], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_learning_rate_follows_the_count_in_the_state(name):
    params, settings = tree(0), plain(name=name, warmup_steps=5)
    first = optimizer.make(settings, 9, AXES)
    update = jax.jit(first.update)
    state = first.init(params)
    for seed in range(3):
        _, state = update(tree(seed), state, params)
    resumed = optimizer.make(settings, 9, AXES)  # nothing but the state goes over
    again = jax.jit(resumed.update)
    a, _ = update(tree(7), state, params)
    b, _ = again(tree(7), jax.tree.map(np.asarray, state), params)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    fresh, _ = again(tree(7), resumed.init(params), params)
    # The first of five updates that rise is small, the fourth is not.
    assert 0 < 2 * optax.global_norm(fresh) < optax.global_norm(b)


@pytest.mark.parametrize('name', NAMES)
def test_moments_live_with_their_parameters(name):
    mesh = jax.make_mesh((2,), ('fsdp',))
    params = jax.eval_shape(lambda: tree(0))

    def spec(axes):
        return NamedSharding(mesh, PartitionSpec(*('fsdp' if a == 'embed' else None for a in axes)))

    shardings = jax.tree.map(spec, AXES, is_leaf=lambda x: isinstance(x, tuple))
    tx = optimizer.make(plain(name=name, moments_dtype='bfloat16'), 9, AXES)
    placed = optimizer.state_shardings(jax.eval_shape(tx.init, params), shardings)
    moments = 0
    for path, sharding in jax.tree_util.tree_leaves_with_path(placed):
        leaf = getattr(path[-1], 'key', None)
        moments += leaf in LEAVES
        expected = (
            spec(AXES['model'][leaf]) if leaf in LEAVES else NamedSharding(mesh, PartitionSpec())
        )
        assert sharding == expected, path
    matrices = sum(sides is not None for *_, sides in LEAVES.values())
    assert moments == 2 * len(LEAVES) - (matrices if name == 'muon' else 0)
    state = jax.jit(tx.init, out_shardings=placed)(tree(0))
    assert jax.tree.all(
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, placed)
    )
