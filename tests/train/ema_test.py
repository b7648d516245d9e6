"""The running average of the parameters: exact, placed, saved, resumed, and no part of training."""

import dataclasses
import itertools
import json
import logging
import shutil

import jax
import numpy as np
import pytest
import small_run
from etils import epath
from train_steps import mesh_of, random_batch, settings

from helios_jax import checkpoint, config, restoring
from helios_jax.checkpoint import manifest
from helios_jax.errors import UserError
from helios_jax.evaluate.held_out import held_out
from helios_jax.parallel import mesh as meshes
from helios_jax.train import dry_run, loop, update
from helios_jax.train import state as states
from helios_jax.train import step as steps

pytestmark = pytest.mark.usefixtures('quick_runs')

DECAY = 0.9
ON_HOST = {'memory.optimizer': 'host', 'memory.parameters': 'host'}
MOMENTS_ON_HOST = {'memory.optimizer': 'host'}


def configured(pattern: str, **changes) -> config.Config:
    return config.replace(settings(pattern), {'train.ema': DECAY, **changes})


def assert_averaged(new, old, params, decay=DECAY):
    """The formula's float32 value in every element, whether its product is rounded or fused."""

    def check(path, new, old, param):
        share, apart = np.float32(1 - decay), param - old
        rounded = old + share * apart
        fused = (old + np.float64(share) * apart.astype(np.float64)).astype(np.float32)
        assert new.dtype == old.dtype == np.float32
        assert np.all((new == rounded) | (new == fused)), jax.tree_util.keystr(path)

    jax.tree.map_with_path(check, *jax.device_get((new, old, params)))


@pytest.mark.parametrize('decay', [0.5, 0.9, 0.999, 0.99999])
def test_many_updates_are_numpys_to_the_last_digits(decay):
    setup = states.create(configured('dense', **{'train.ema': decay}), mesh_of({}, 1))
    rng = np.random.default_rng(3)
    draw = lambda: 3 + rng.standard_normal((5, 7)).astype(np.float32)
    start = draw()
    run = jax.jit(lambda ema, params: update.averaged(setup, {'w': ema}, {'w': params})['w'])
    ema, exact = start, start.astype(np.float64)
    for _ in range(50):
        params = draw()
        new = run(ema, params)
        assert_averaged(new, ema, params, decay)
        ema, exact = np.asarray(new), decay * exact + (1 - decay) * params
    # One rounding an update, each of half a unit in the last place at most.
    assert np.abs(ema - exact).max() <= 50 * np.spacing(np.float32(4)) / 2


def test_what_is_equal_stays_equal():
    setup = states.create(configured('dense', **{'train.ema': 0.9999}), mesh_of({}, 1))
    same = np.random.default_rng(5).standard_normal(997).astype(np.float32)
    assert np.array_equal(update.averaged(setup, {'w': same}, {'w': same})['w'], same)


def test_off_there_is_nothing_of_it():
    setup = states.create(settings('moe'), mesh_of({}, 1))
    assert setup.state.ema == {} == update.averaged(setup, {}, setup.state.params)
    assert 'ema' not in dry_run.describe(settings('moe'), 1).split('# Sizes')[1]
    assert 'ema GiB' in dry_run.describe(configured('moe'), 1)


@pytest.mark.parametrize('changes', [{}, MOMENTS_ON_HOST, ON_HOST], ids=['device', 'one', 'both'])
def test_it_lies_where_the_moments_do_and_is_split_as_the_parameters_are(changes):
    setup = states.create(configured('moe', **changes), mesh_of({'fsdp': 2, 'expert': 4}, 8))
    kind = 'pinned_host' if changes else None
    for param, ema in zip(
        *map(jax.tree.leaves, (setup.state.params, setup.state.ema)), strict=True
    ):
        assert (ema.shape, ema.sharding.spec) == (param.shape, param.sharding.spec)
        assert ema.dtype == np.float32 and (not kind or ema.sharding.memory_kind == kind)


def trained(cfg: config.Config, sizes, num_devices):
    """The states after none to three steps."""
    setup = states.create(cfg, mesh_of(sizes, num_devices))
    with jax.set_mesh(setup.mesh):
        state = states.initialize(setup)
        done = [jax.device_get(state)]
        made = steps.compile_step(setup, setup.state, random_batch())
        for seed in range(3):
            state, _ = made.run(state, random_batch(seed))
            done.append(jax.device_get(state))
    for x, like in zip(*map(jax.tree.leaves, (state, setup.state)), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        assert x.sharding.memory_kind == like.sharding.memory_kind
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ('pattern', 'changes', 'sizes', 'backend'),
    [
        pytest.param('dense', {}, {}, 'cpu', id='device'),
        pytest.param(
            'moe',
            {**ON_HOST, 'train.microbatches': 2},
            {'fsdp': 2, 'expert': 4},
            'cpu',
            id='host',
            marks=pytest.mark.long,
        ),
        pytest.param('dense', MOMENTS_ON_HOST, {}, 'gpu', id='programs', marks=pytest.mark.long),
    ],
)
def test_each_step_averages_what_it_made(pattern, changes, sizes, backend, monkeypatch):
    if backend == 'gpu':
        monkeypatch.setattr(steps.jax, 'default_backend', lambda: backend)
    done = trained(configured(pattern, **changes), sizes, 8 if sizes else 1)
    jax.tree.map(np.testing.assert_array_equal, done[0].ema, done[0].params)
    for before, after in itertools.pairwise(done):
        assert_averaged(after.ema, before.ema, after.params)
    moved = jax.tree.map(lambda e, p: np.abs(e - p).max(), done[3].ema, done[3].params)
    assert min(jax.tree.leaves(moved)) > 0
    if not changes:
        plain = trained(config.replace(configured(pattern), {'train.ema': 0.0}), sizes, 1)
        expected = [state.replace(ema={}) for state in done]
        jax.tree.map(np.testing.assert_array_equal, plain, expected)


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> config.Config:
    cfg = small_run.make_config(tmp_path_factory.mktemp('text'))
    changes = {'train.num_steps': 4, 'train.checkpoint_every': 1, 'train.eval_every': 0}
    return config.replace(cfg, {**changes, 'train.keep_checkpoints': 9, 'train.ema': DECAY})


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr('helios_jax.train.finish.SAMPLE_TOKENS', 3)


def items(cfg, workdir, step: int) -> dict:
    state = states.create(cfg.resolve(256), meshes.make(config.Mesh())).state
    opened = checkpoint.open_step(workdir / 'checkpoints', step)
    names = ('params', 'optimizer', 'ema')
    return jax.device_get({n: opened.restore(n, getattr(state, n)) for n in names})


@pytest.mark.slow
def test_a_run_is_resumed_bit_identically_and_scored_by_its_average(small, tmp_path):
    cfg = small
    straight, resumed = tmp_path / 'straight', tmp_path / 'resumed'
    scores = loop.train(cfg, straight)
    shutil.copytree(straight, resumed)
    for step in (3, 4):
        shutil.rmtree(resumed / f'checkpoints/{step}')
    (resumed / 'report.md').unlink()
    assert loop.train(cfg, resumed) == scores
    ends = [items(cfg, workdir, 4) for workdir in (straight, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    before = items(cfg, straight, 3)
    assert_averaged(ends[0]['ema'], before['ema'], ends[0]['params'])
    rows = {'num_rows': cfg.train.eval_rows, 'batch_rows': cfg.train.batch_rows}
    for weights, prefix in (('auto', ''), ('ema', ''), ('trained', 'trained_')):
        restored = restoring.restore(straight, weights=weights)
        figures = held_out(restored, **rows)
        for name in ('loss', 'bits_per_byte'):
            assert figures[name] == pytest.approx(scores[prefix + name], rel=1e-5)
    assert scores['loss'] != scores['trained_loss']
    assert 'trained weights' in (straight / 'report.md').read_text()


@pytest.mark.slow
def test_a_checkpoint_from_before_begins_it_with_its_parameters(small, tmp_path, caplog):
    workdir = tmp_path / 'run'
    loop.train(config.replace(small, {'train.ema': 0.0, 'train.num_steps': 2}), workdir)
    with pytest.raises(UserError, match=r'train\.ema=0\.9, but .* was trained with 0\.0; set it'):
        loop.train(small, workdir)
    path = workdir / 'checkpoints/2/metadata/metadata'
    metadata = json.loads(path.read_text())
    del metadata['config']['train']['ema']
    path.write_text(json.dumps(metadata))
    manifest.write(epath.Path(workdir / 'checkpoints/2'))
    caplog.set_level(logging.INFO)
    loop.train(small, workdir)
    assert 'checkpoints/2 is from before it; its parameters begin it' in caplog.text
    plain = dataclasses.replace(small, train=dataclasses.replace(small.train, ema=0.0))
    start = small_run.saved(plain, workdir, 2)['params']
    third, fourth = (items(small, workdir, step) for step in (3, 4))
    assert_averaged(third['ema'], start, third['params'])
    assert_averaged(fourth['ema'], third['ema'], fourth['params'])


@pytest.mark.long
def test_fine_tuning_begins_it_with_the_parents_parameters(small, tmp_path):
    loop.train(config.replace(small, {'train.num_steps': 1}), tmp_path / 'parent')
    parent = items(small, tmp_path / 'parent', 1)
    changes = {'train.num_steps': 1, 'train.init_from': str(tmp_path / 'parent')}
    loop.train(config.replace(small, changes), tmp_path / 'child')
    child = items(small, tmp_path / 'child', 1)
    assert_averaged(child['ema'], parent['params'], child['params'])
