"""One step, on every mesh, in any number of microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_steps import MUON, PATTERNS, B, T, V, assert_close, mesh_of, random_batch, settings

from helios_jax import config
from helios_jax.errors import UserError
from helios_jax.train import state as states
from helios_jax.train import step as steps

pytestmark = pytest.mark.usefixtures('quick_compilation')

MESHES = [
    {'fsdp': 8},
    {'data': 2, 'fsdp': 4},
    {'tensor': 4, 'fsdp': 2},
    {'expert': 4, 'fsdp': 2},
    {'context': 2, 'fsdp': 4},
    {'expert': 2, 'context': 2, 'tensor': 2},
    {'slice': 2, 'data': 2, 'expert': 2},
]


@functools.cache
def begun(pattern: str) -> states.TrainState:
    """Host copy of a state whose gates, norms and balance bias are no longer at their start."""
    cfg = settings(pattern)
    setup = states.create(cfg, mesh_of({}, 1))
    with jax.set_mesh(setup.mesh):
        state = jax.device_get(states.initialize(setup))
    rng = np.random.default_rng(7)
    shake = lambda x: x + rng.standard_normal(x.shape).astype(x.dtype) / 20
    return state.replace(
        params=jax.tree.map(shake, state.params), router=jax.tree.map(shake, state.router)
    )


def run(cfg: config.Config, sizes: dict[str, int], num_devices: int, batches=None):
    """The setup, and state and metrics after each of two steps from `begun`."""
    pattern = 'moe' if cfg.model.prefix else 'dense'
    setup = states.create(cfg, mesh_of(sizes, num_devices))
    with jax.set_mesh(setup.mesh):
        state = begun(pattern)
        state = state.replace(optimizer=setup.optimizer.init(state.params))
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, setup.state)
        train_step = jax.jit(steps.make_train_step(setup))
        done = []
        for batch in batches or [random_batch(0), random_batch(1)]:
            state, metrics = train_step(state, batch)
            done.append((state, jax.device_get(metrics)))
    return setup, done


@functools.cache
def on_one_device(pattern: str):
    return jax.device_get(run(settings(pattern), {}, 1)[1])


def assert_placed(setup, state):
    """Every array of the state is where the setup wants it; those on the host are left out."""
    places = jax.tree.map(
        lambda x, like: (
            isinstance(x, np.ndarray) or x.sharding.is_equivalent_to(like.sharding, x.ndim)
        ),
        state,
        setup.state,
    )
    assert all(jax.tree.leaves(places)), 'some of the state has moved elsewhere'


@pytest.mark.slow
@pytest.mark.parametrize('pattern', PATTERNS)
def test_two_steps_change_every_parameter_by_more_than_meshes_may_differ(pattern):
    # Without this, agreement below could be the agreement of parameters that never moved.
    start, (_, (end, _)) = begun(pattern), on_one_device(pattern)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params, end.params)
    assert min(jax.tree.leaves(moved)) > 1e-4, moved
    assert end.step == 2


@pytest.mark.parametrize(
    ('pattern', 'sizes'),
    [pytest.param('moe', sizes, marks=pytest.mark.slow) for sizes in MESHES[1::2]]
    + [pytest.param('moe', sizes, marks=pytest.mark.long) for sizes in MESHES[::2]]
    + [pytest.param('dense', MESHES[0], marks=pytest.mark.slow)]
    + [pytest.param('dense', sizes, marks=pytest.mark.long) for sizes in MESHES[1:5]],
    ids=str,
)
def test_eight_devices_compute_what_one_does(pattern, sizes):
    setup, done = run(settings(pattern), sizes, 8)
    assert_close(jax.device_get(done), on_one_device(pattern))
    assert_placed(setup, done[-1][0])


@pytest.mark.slow
@pytest.mark.parametrize('pattern', PATTERNS)
def test_unrolled_layers_step_as_scanned_ones_do(pattern):
    cfg = config.replace(settings(pattern), {'memory.layers': 'unrolled'})
    setup, done = run(cfg, {'data': 2, 'fsdp': 2}, 4)
    assert_close(jax.device_get(done), on_one_device(pattern))
    assert_placed(setup, done[-1][0])


@pytest.mark.slow
@pytest.mark.parametrize('pattern', PATTERNS)
def test_four_microbatches_equal_one_with_unequal_padding(pattern):
    cfg = settings(pattern)
    train = dataclasses.replace(cfg.train, microbatches=4)
    done = run(dataclasses.replace(cfg, train=train), {'data': 2, 'fsdp': 2}, 4)[1]
    expected = on_one_device(pattern)
    actual = jax.device_get(done)
    for (state, metrics), (expected_state, expected_metrics) in zip(actual, expected, strict=True):
        # The one figure that is no mean over tokens (and no part of the loss here).
        metrics.pop('router/balance_loss', None)
        assert_close(metrics, {name: expected_metrics[name] for name in metrics})
        assert_close(state, expected_state)


@functools.cache
def logits_and_load(pattern: str):
    """Of the first batch, by the model alone."""
    cfg, state = settings(pattern), begun(pattern)
    setup = states.create(cfg, mesh_of({}, 1))
    batch = jax.tree.map(jnp.asarray, random_batch(0))
    variables = {'params': state.params, 'router': state.router}

    @jax.jit
    def forward(variables):
        args = variables, batch.tokens, batch.positions, batch.segment_ids
        return setup.model.apply(*args, method='logits'), setup.model.apply(*args)[1]

    return jax.device_get(forward(variables))


@pytest.mark.slow
@pytest.mark.parametrize('pattern', ['dense', 'moe'])
def test_the_loss_is_the_mean_over_the_next_tokens_that_count(pattern):
    batch, (logits, _) = random_batch(0), logits_and_load(pattern)
    assert np.isneginf(logits[..., V:]).all()
    nll, counted = 0.0, 0
    for row in range(B):
        for t in range(T - 1):
            segment = batch.segment_ids[row, t]
            if segment and segment == batch.segment_ids[row, t + 1] and batch.loss_mask[row, t + 1]:
                scores = logits[row, t, :V].astype(np.float64)
                nll += np.log(np.exp(scores).sum()) - scores[batch.tokens[row, t + 1]]
                counted += 1
    assert 0 < counted < batch.loss_mask.sum() < (batch.segment_ids > 0).sum()
    _, metrics = on_one_device(pattern)[0]
    np.testing.assert_allclose(metrics['loss'], nll / counted, rtol=1e-5)
    assert metrics['targets'] == counted
    assert metrics['tokens'] == (batch.segment_ids > 0).sum()


@pytest.mark.slow
def test_the_balance_bias_moves_by_its_rate_towards_the_mean_load():
    (stats,) = logits_and_load('moe')[1]['periods'].values()
    load = stats.load
    batch, moe = random_batch(0), settings('moe').model.moe
    assert load.sum() == (batch.segment_ids > 0).sum() * moe.num_experts_per_token
    bias = lambda state: state.router['periods']['layer_0']['moe']['bias']
    (state, metrics), _ = on_one_device('moe')
    move = moe.bias_rate * np.sign(load.mean(axis=-1, keepdims=True) - load)
    assert np.abs(move).max() > 0
    np.testing.assert_array_equal(bias(state), bias(begun('moe')) + move.astype(np.float32))
    np.testing.assert_allclose(
        metrics['router/load_max_over_mean'], load.max() / load.mean(), rtol=1e-6
    )
    # No gradient and no moment of it exists.
    parameters, biases = len(jax.tree.leaves(state.params)), len(jax.tree.leaves(state.router))
    counts = [x for x in jax.tree.leaves(state.optimizer) if x.ndim == 0]
    assert biases == 1
    assert len(jax.tree.leaves(state.optimizer)) == 2 * parameters + len(counts)


@pytest.mark.slow
@pytest.mark.parametrize('balance', ['aux', 'none'])
def test_other_ways_to_balance_leave_the_bias_alone(balance):
    router = begun('moe').router
    load = {'periods': {'layer_0': jnp.arange(12.0)[None]}}
    moe = config.MoE(num_experts=12, balance=balance)
    assert steps.balance(moe, router, load) is router


@pytest.mark.slow
def test_one_stream_a_row_equals_one_segment_a_row():
    full = random_batch(0)._replace(
        segment_ids=np.ones((B, T), np.int32),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        tokens=np.random.default_rng(3).integers(0, V, (B, T)).astype(np.int32),
    )
    packed = settings('dense')
    data = dataclasses.replace(packed.data, packing='concatenate')
    streams = dataclasses.replace(packed, data=data)
    # What a row of one stream says of segments must not matter to attention.
    (_, of_packed), (_, of_streams) = (run(cfg, {}, 1, [full]) for cfg in (packed, streams))
    assert_close(jax.device_get(of_streams), jax.device_get(of_packed), rtol=1e-5)


@pytest.mark.slow
def test_muon_updates_alike_with_its_state_sharded_like_the_parameters():
    cfg, state = settings('moe', optimizer=MUON), begun('moe')
    rng = np.random.default_rng(5)
    gradients = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), state.params
    )
    made = []
    for sizes, devices in (({}, 1), ({'fsdp': 2, 'expert': 2, 'tensor': 2}, 8)):
        setup = states.create(cfg, mesh_of(sizes, devices))
        put = lambda tree: jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding),
            tree,
            setup.state.params,  # noqa: B023
        )
        where = jax.tree.map(lambda x: x.sharding, setup.state.optimizer)
        with jax.set_mesh(setup.mesh):
            moments = jax.jit(setup.optimizer.init, out_shardings=where)(put(state.params))
            update = jax.jit(setup.optimizer.update)
            made.append(update(put(gradients), moments, put(state.params)))
        assert_placed(setup, state.replace(params=made[-1][0], optimizer=made[-1][1]))
    sharded = {
        leaf.shape
        for leaf in jax.tree.leaves(setup.state.optimizer)
        if leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    }
    assert (1, 12, 24, 20) in sharded and (1, 24, 8, 6) in sharded  # experts and queries
    # Orthogonalising raises small singular values, with their rounding, to the size of large ones.
    one, eight = jax.device_get(made)
    assert_close(eight, one, rtol=1e-3, atol=1e-3 * MUON.learning_rate)


@pytest.mark.slow
def test_fresh_state_is_the_same_on_every_mesh_and_born_where_it_lives():
    cfg = settings('moe')
    made = []
    for sizes, devices in (({}, 1), ({'fsdp': 2, 'expert': 2, 'tensor': 2}, 8)):
        setup = states.create(cfg, mesh_of(sizes, devices))
        with jax.set_mesh(setup.mesh):
            made.append(states.initialize(setup))
        assert_placed(setup, made[-1])
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(made))


def test_master_weights_and_moments_stay_float32_in_bfloat16_compute():
    cfg = settings('moe')
    model = dataclasses.replace(cfg.model, compute_dtype='bfloat16')
    setup = states.create(dataclasses.replace(cfg, model=model), mesh_of({}, 1))
    with jax.set_mesh(setup.mesh):
        step = steps.make_train_step(setup)
        state, metrics = jax.eval_shape(step, setup.state, random_batch(0))
    assert {x.dtype for x in jax.tree.leaves((state.params, state.router))} == {jnp.float32.dtype}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), setup.state
    )
    assert metrics['loss'].dtype == jnp.float32


@pytest.mark.parametrize(
    ('sizes', 'microbatches', 'named'),
    [
        ({'fsdp': 8}, 4, 'train.batch_rows=16.*not divisible'),
        ({'context': 4, 'fsdp': 2}, 1, 'data.row_length=28 must be a multiple of 8'),
        ({'tensor': 8}, 1, 'kv_heads=4.*not divisible'),
        ({'expert': 8}, 1, 'experts=12.*not divisible'),
    ],
)
def test_what_a_mesh_does_not_divide_is_refused_before_compiling(sizes, microbatches, named):
    cfg = settings('moe')
    train = dataclasses.replace(cfg.train, microbatches=microbatches)
    with pytest.raises(UserError, match=named):
        states.create(dataclasses.replace(cfg, train=train), mesh_of(sizes, 8))


def test_documents_are_counted_where_a_gpu_would_wait_for_it(monkeypatch):
    packed = config.Data(packing='best_fit')
    batch = random_batch(0)._replace(segment_ids=np.array([[1, 1, 2, 0], [1, 2, 3, 4]]))
    assert not steps.few_documents(packed, batch)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert not steps.few_documents(config.Data(packing='concatenate'), batch)
    for limit, few in ((4, True), (3, False)):
        monkeypatch.setattr(steps, 'CUDNN_SEGMENTS', limit)
        assert steps.few_documents(packed, batch) == few
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(steps, 'CUDNN_SEGMENTS', 4)
    assert not steps.few_documents(packed, batch)
