"""A state on the host against the same state on the device."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
from train_steps import LINEAR, MUON, assert_close, mesh_of, random_batch, settings

from helios_jax import checkpoint, config
from helios_jax.parallel import mesh as meshes
from helios_jax.train import dry_run, loop, update
from helios_jax.train import state as states
from helios_jax.train import step as steps

pytestmark = pytest.mark.usefixtures('quick_compilation')

UNITS = ('attention_gmu', 'mlp_gmu')
ON_DEVICE = config.Memory('none')
ON_HOST = config.Memory('none', optimizer='host', parameters='host')
SPLIT = {'fsdp': 2, 'expert': 2, 'tensor': 2}


def configured(pattern: str, memory: config.Memory, layers: int = 4, **replaced) -> config.Config:
    """More scanned layers than are on the device at a time; `replaced` are fields of the model."""
    cfg = settings(pattern, memory=memory)
    model = dataclasses.replace(cfg.model, num_layers=layers, **replaced)
    return dataclasses.replace(cfg, model=model)


def assert_same(actual, expected):
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path)),
        *jax.device_get((actual, expected)),
    )


def assert_placed(state, abstract):
    for (path, x), like in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(abstract), strict=True
    ):
        assert x.sharding.memory_kind == like.sharding.memory_kind, path
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim), path


@pytest.mark.parametrize(
    ('pattern', 'rule'),
    [
        pytest.param('dense', LINEAR, marks=pytest.mark.long, id='dense-adamw'),
        pytest.param('moe', MUON, marks=pytest.mark.slow, id='moe-muon'),
    ],
)
def test_the_update_of_each_layer_alone_is_the_update_of_all(pattern, rule):
    # One operation at a time: where they are fused, the compiler may round either in its own way.
    made = []
    for memory in (ON_DEVICE, ON_HOST):
        cfg = dataclasses.replace(configured(pattern, memory, layers=3), optimizer=rule)
        # XLA rounds the products of one number alone otherwise than those of an array.
        off = dict.fromkeys(('model.gmu.embedding', 'model.gmu.stream_scale'), 'off')
        cfg = config.replace(cfg, off)
        setup = states.create(cfg, mesh_of({}, 1))
        rng = np.random.default_rng(3)
        draw = lambda tree: jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),  # noqa: B023
            tree,
        )
        with jax.disable_jit():
            params = draw(setup.state.params)
            state = setup.state.replace(params=params, optimizer=setup.optimizer.init(params))
            state = put(state, setup.state)
            for _ in range(3):
                gradients = draw(setup.state.params)
                norm = optax.global_norm(gradients)
                if memory == ON_HOST:
                    state = update.in_one_program(setup, gradients, norm, state)
                else:
                    updates, moments = setup.optimizer.update(
                        gradients, state.optimizer, state.params
                    )
                    params = optax.apply_updates(state.params, updates)
                    ema = update.averaged(setup, state.ema, params)
                    state = state.replace(params=params, optimizer=moments, ema=ema)
        kept = state.params, state.optimizer
        assert_placed(kept, (setup.state.params, setup.state.optimizer))
        made.append(kept)
    assert_same(*made)
    counts = [x for x in jax.tree.leaves(made[1][1]) if x.ndim == 0]
    assert counts and all(count == 3 for count in counts)


def put(state, like):
    """Parameters and moments where the setup wants them."""
    move = functools.partial(jax.tree.map, lambda x, to: jax.device_put(x, to.sharding))
    return state.replace(
        params=move(state.params, like.params), optimizer=move(state.optimizer, like.optimizer)
    )


def trained(cfg: config.Config, sizes: dict[str, int], num_devices: int):
    """State and metrics after each of three steps."""
    setup = states.create(cfg, mesh_of(sizes, num_devices))
    with jax.set_mesh(setup.mesh):
        state = states.initialize(setup)
        assert_placed(state, setup.state)
        done = [jax.device_get(state)]
        step = jax.jit(steps.make_train_step(setup), donate_argnums=0)
        for seed in range(3):
            state, metrics = step(state, random_batch(seed))
            done.append(jax.device_get((state, metrics)))
        assert_placed(state, setup.state)
    return done


@pytest.mark.parametrize(
    ('pattern', 'rule', 'sizes', 'num_devices'),
    [
        pytest.param('dense', LINEAR, {}, 1, marks=pytest.mark.slow),
        pytest.param('moe', LINEAR, SPLIT, 8, marks=pytest.mark.long),
        pytest.param('moe', MUON, {}, 1, marks=pytest.mark.long),
        pytest.param('dense', MUON, {'fsdp': 4, 'tensor': 2}, 8, marks=pytest.mark.long),
    ],
    ids=['dense-adamw-1', 'moe-adamw-8', 'moe-muon-1', 'dense-muon-8'],
)
def test_three_steps_are_those_on_the_device(pattern, rule, sizes, num_devices):
    runs = []
    for memory in (ON_DEVICE, ON_HOST):
        cfg = dataclasses.replace(configured(pattern, memory), optimizer=rule)
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, microbatches=2))
        runs.append(trained(cfg, sizes, num_devices))
    one, other = runs
    assert_same(other[0], one[0])
    assert other[1][1]['loss'] == one[1][1]['loss']
    # The update of all fuses otherwise: a last bit of some parameters differs, and then spreads.
    assert_close(other[1:], one[1:], rtol=1e-4 if rule is LINEAR else 1e-3, atol=1e-5)


@pytest.mark.long
def test_steps_in_bfloat16_over_devices_are_those_on_the_device():
    runs = []
    for memory in (ON_DEVICE, ON_HOST):
        cfg = configured('dense', memory, compute_dtype='bfloat16')
        runs.append(trained(dataclasses.replace(cfg, optimizer=LINEAR), {'fsdp': 8}, 8))
    assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('rule', 'memory', 'sizes'),
    [
        (LINEAR, ON_HOST, {'fsdp': 8}),
        pytest.param(MUON, config.Memory('none', optimizer='host'), {}, marks=pytest.mark.long),
    ],
    ids=['adamw-8', 'muon-1'],
)
def test_a_program_for_each_part_updates_as_one_for_all(rule, memory, sizes, monkeypatch):
    cfg = dataclasses.replace(configured('dense', memory), optimizer=rule)
    setup = states.create(cfg, mesh_of(sizes, 8 if sizes else 1))
    ends = []
    with jax.set_mesh(setup.mesh):
        for backend in ('tpu', 'gpu'):
            monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
            made = steps.compile_step(setup, setup.state, random_batch())
            monkeypatch.undo()
            state = states.initialize(setup)
            for seed in range(3):
                state, metrics = made.run(state, random_batch(seed))
            assert_placed(state, setup.state)
            ends.append(jax.device_get((state, metrics)))
    assert ends[0][0].step == 3
    assert_close(ends[1], ends[0], rtol=1e-4 if rule is LINEAR else 1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('parts', [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize('memory', [ON_DEVICE, ON_HOST], ids=['device', 'host'])
def test_the_copys_gradient_is_that_of_the_weights(memory, parts, monkeypatch):
    cfg = configured('moe', memory, layers=3, compute_dtype='bfloat16', tied_embeddings=False)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, microbatches=parts))
    setup = states.create(cfg, mesh_of({}, 1))
    with jax.set_mesh(setup.mesh):
        state = states.initialize(setup)
        near = jax.device_put(state.params, jax.memory.Space.Device)
        copy = jax.jit(functools.partial(update.working_copy, setup))(state.params)
        gradient = lambda params: jax.jit(functools.partial(steps.gradient, setup))(
            state.replace(params=params), random_batch()
        )
        narrow = gradient(state.params)
        monkeypatch.setattr(update, 'working_copy', lambda setup, params: params)
        wide = gradient(near)
    assert_same(narrow[1]['loss'], wide[1]['loss'])
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), narrow[0])
    assert_same(widened, wide[0])
    assert {x.dtype for x in jax.tree.leaves(wide[0])} == {jnp.dtype('float32')}
    dtypes = {str(x.dtype) for x in jax.tree.leaves(narrow[0])}
    assert dtypes == ({'float32', 'bfloat16'} if parts == 1 else {'float32'})
    stays = {
        jax.tree_util.keystr(path, simple=True, separator='.').split('.', 2)[-1]
        for path, x in jax.tree.leaves_with_path(copy)
        if x.dtype == jnp.float32
    }
    inside = {name.removesuffix('.scale') for name in stays if name.endswith('scale')}
    assert all('norm' in name or name == 'scale' for name in inside)
    others = {name for name in stays if not name.endswith('scale')}
    units = {f'{unit}.{name}' for unit in UNITS for name in ('bias', 'embedding')}
    assert others == {'w', 'moe.router.w', *units}  # w: embeddings


@pytest.mark.slow
def test_a_run_on_the_host_is_saved_scored_and_resumed_bit_identically(tmp_path, monkeypatch):
    monkeypatch.setattr('helios_jax.train.finish.SAMPLE_TOKENS', 3)
    cfg = small_run.make_config(tmp_path)
    train = dataclasses.replace(cfg.train, num_steps=4, checkpoint_every=2)
    cfg = dataclasses.replace(cfg, train=train, memory=ON_HOST)
    straight, resumed = tmp_path / 'straight', tmp_path / 'resumed'
    held_out = loop.train(cfg, straight)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / 'checkpoints' / '4')
    (resumed / 'report.md').unlink()
    assert loop.train(cfg, resumed) == held_out
    setup = states.create(cfg.resolve(256), meshes.make(config.Mesh()))
    ends = []
    for workdir in (straight, resumed):
        lines = (workdir / 'metrics.jsonl').read_text().splitlines()
        assert [json.loads(line)['step'] for line in lines][-1] == 4
        items = {'params': setup.state.params, 'optimizer': setup.state.optimizer}
        ends.append(
            {
                n: checkpoint.open_step(workdir / 'checkpoints', 4).restore(n, t)
                for n, t in items.items()
            }
        )
        assert_placed(ends[-1], items)
    assert_same(*ends)


def test_the_dry_run_says_what_lies_on_the_host():
    text = dry_run.describe(configured('dense', config.Memory('none', optimizer='host')), 1)
    (moments,) = [line for line in text.splitlines() if line.startswith('optimizer GiB')]
    (params,) = [line for line in text.splitlines() if line.startswith('params GiB')]
    assert moments.endswith('in the memory of its host') and 'host' not in params
