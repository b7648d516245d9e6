"""A checkpoint path is all that is needed, on any number of devices."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import small_checkpoints
from etils import epath
from small_checkpoints import flat

import helios_jax
from helios_jax import checkpoint, config, restoring
from helios_jax.checkpoint import manifest
from helios_jax.data import tokenizer as tokenizers
from helios_jax.data.bpe import train_bpe
from helios_jax.errors import UserError
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states

pytestmark = pytest.mark.usefixtures('quick_compilation')

CONFIG = config.Config(
    model=config.Model(
        num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=40,
        prefix='dense', period='moe', moe=config.MoE(num_experts=4), compute_dtype='float32',
    ),
    data=config.Data(row_length=16),
    train=config.Train(batch_rows=8),
).resolve(256)  # fmt: skip
MESHES = {'one': ({'fsdp': 1}, 1), 'eight': ({'fsdp': 2, 'expert': 2, 'tensor': 2}, 8)}


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes, devices = MESHES[name]
    return meshes.make(config.Mesh(**sizes), jax.devices()[:devices])


def setup_on(name: str, cfg: config.Config = CONFIG) -> states.Setup:
    return states.create(cfg, mesh_of(name))


@functools.cache
def numbers() -> dict:
    """Every variable of the model, all different."""
    state = setup_on('one').state
    variables = {'params': state.params, 'router': state.router}
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), variables)


def write(directory, name: str, cfg: config.Config = CONFIG, step: int = 3):
    state = setup_on(name).state
    where = {'params': state.params, 'router': state.router}
    items = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), numbers(), where)
    with contextlib.closing(checkpoint.Checkpoints(directory / 'checkpoints', keep=3)) as writer:
        tokenizer = tokenizers.load('bytes').save(epath.Path(directory))
        writer.save(step, items, {'config': dataclasses.asdict(cfg), 'tokenizer': tokenizer})


@pytest.mark.parametrize(
    ('written', 'read'),
    [
        ('one', 'one'),
        pytest.param('one', 'eight', marks=pytest.mark.slow),
        pytest.param('eight', 'one', marks=pytest.mark.slow),
        pytest.param('eight', 'eight', marks=pytest.mark.slow),
    ],
)
def test_any_mesh_reads_what_any_other_wrote(written, read, tmp_path):
    write(tmp_path, written)
    restored = restoring.restore(tmp_path, mesh=mesh_of(read))
    jax.tree.map(np.testing.assert_array_equal, restored.variables, numbers())
    assert restored.config == CONFIG
    assert restored.tokenizer.vocab_size == 256
    state = setup_on(read).state
    for name, like in (('params', state.params), ('router', state.router)):
        jax.tree.map(
            lambda x, to: np.testing.assert_(x.sharding.is_equivalent_to(to.sharding, x.ndim)),
            restored.variables[name],
            like,
        )
    assert restoring.mesh_of(restored.variables) == mesh_of(read)


def test_without_a_mesh_all_devices_share_the_weights(tmp_path):
    write(tmp_path, 'one')
    model, variables, _, _ = helios_jax.restore(str(tmp_path / 'checkpoints'), 'latest')
    assert restoring.mesh_of(variables).shape['fsdp'] == 8
    head = variables['params']['unembedding']['w']
    assert head.sharding.shard_shape(head.shape) == (24, 32)
    assert model.model == CONFIG.model


def test_weights_that_the_devices_do_not_divide_are_copied_to_each(tmp_path):
    shapes = setup_on('one', config.replace(CONFIG, {'model.embed_dim': 20}))
    where = shapes.state.params, shapes.axes
    mesh = restoring.default_mesh(where[1], where[0])
    assert (mesh.shape['data'], mesh.shape['fsdp']) == (8, 1)


def test_positions_may_be_rescaled_while_restoring(tmp_path):
    write(tmp_path, 'one')
    restored = restoring.restore(tmp_path, rope={'scaling': 'dynamic'}, mesh=mesh_of('one'))
    rope = restored.model.model.rope
    assert (rope.scaling, rope.trained_length) == ('dynamic', 16)
    with pytest.raises(UserError, match=r'factor=0\.5'):
        restoring.restore(tmp_path, rope={'scaling': 'static', 'factor': 0.5}, mesh=mesh_of('one'))


def test_a_step_is_chosen_by_number(tmp_path):
    write(tmp_path, 'one', step=3)
    write(tmp_path, 'one', step=5)
    assert checkpoint.open_step(tmp_path / 'checkpoints', 'latest').step == 5
    jax.tree.map(
        np.testing.assert_array_equal,
        restoring.restore(tmp_path, 3, mesh=mesh_of('one')).variables,
        numbers(),
    )
    with pytest.raises(UserError, match=r'step=4.*3, 5'):
        restoring.restore(tmp_path, 4)
    with pytest.raises(UserError, match='does not exist'):
        restoring.restore(tmp_path / 'none')


def test_a_damaged_step_is_passed_over_but_not_by_its_number(tmp_path, caplog):
    for step in (3, 5):
        write(tmp_path, 'one', step=step)
    data = (tmp_path / 'checkpoints/5/params').rglob('d/*')
    path = max(data, key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    restored = restoring.restore(tmp_path, mesh=mesh_of('one'))
    jax.tree.map(np.testing.assert_array_equal, restored.variables, numbers())
    assert (
        f'checkpoints/5 IS DAMAGED: params/{path.relative_to(tmp_path / "checkpoints/5/params")}'
        in (caplog.text)
    )
    with pytest.raises(checkpoint.DamageError, match=f'{path.name} has changed'):
        restoring.restore(tmp_path, 5, mesh=mesh_of('one'))


def test_what_is_done_meanwhile_knows_the_shapes(tmp_path):
    write(tmp_path, 'one')
    given: list[restoring.Restored] = []
    restored = restoring.restore(tmp_path, mesh=mesh_of('eight'), meanwhile=given.append)
    of = lambda x: (x.shape, x.dtype, x.sharding)
    (early,) = given
    assert jax.tree.map(of, early.variables) == jax.tree.map(of, restored.variables)
    assert early._replace(variables=None) == restored._replace(variables=None)
    with pytest.raises(ZeroDivisionError):
        restoring.restore(tmp_path, mesh=mesh_of('one'), meanwhile=lambda early: 1 / 0)


@pytest.fixture(scope='module')
def with_tokenizer(tmp_path_factory):
    """A step with an optimizer's state, larger than the parameters, and a tokenizer's file."""
    workdir = tmp_path_factory.mktemp('with_tokenizer')
    folder = checkpoint.tokenizer_directory(workdir / 'checkpoints')
    path = folder / 'tokenizer.json'
    texts = [f'{n} quick brown foxes jump over lazy dogs' for n in range(300)]
    train_bpe(texts, 290, path)
    cfg = config.replace(CONFIG, {'model.vocab_size': 290})
    state = states.initialize(setup_on('one', cfg))
    with contextlib.closing(checkpoint.Checkpoints(workdir / 'checkpoints', keep=3)) as writer:
        metadata = {
            'config': dataclasses.asdict(cfg),
            'tokenizer': 'tokenizer.json',
            'tokenizer_files': {'tokenizer.json': hashlib.sha256(path.read_bytes()).hexdigest()},
        }
        rng = np.random.default_rng(1)  # a fresh optimizer's zeros would be compressed
        moments = jax.tree.map(
            lambda x: rng.standard_normal(x.shape).astype(x.dtype), state.optimizer
        )
        items = {'params': state.params, 'router': state.router, 'optimizer': moments}
        writer.save(3, items, metadata)
    return workdir


@pytest.fixture
def workdir(with_tokenizer, tmp_path):
    shutil.copytree(with_tokenizer, tmp_path / 'run')
    return tmp_path / 'run'


def change_metadata(workdir, **changes) -> None:
    path = workdir / 'checkpoints/3/metadata/metadata'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    manifest.write(epath.Path(path.parent.parent))


def test_the_optimizer_is_never_read(workdir, monkeypatch):
    folder = workdir / 'checkpoints/3'
    sizes = {
        part.name: sum(p.stat().st_size for p in part.rglob('*') if p.is_file())
        for part in folder.iterdir()
        if part.is_dir()
    }
    shutil.rmtree(folder / 'optimizer')  # whoever opens any of it fails
    sha256, read = manifest.sha256, []
    monkeypatch.setattr(
        manifest, 'sha256', lambda path: read.append(path.stat().length) or sha256(path)
    )
    restored = restoring.restore(workdir, mesh=mesh_of('one'))
    assert restored.variables.keys() == {'params', 'router'}
    assert sizes['optimizer'] > 1.5 * sizes['params']
    tokenizer = (workdir / 'checkpoints/tokenizer/tokenizer.json').stat().st_size
    assert sum(read) == sizes['params'] + sizes['router'] + sizes['metadata'] + tokenizer


def test_no_flipped_bit_of_the_tokenizer_is_loaded(workdir):
    path = workdir / 'checkpoints/tokenizer/tokenizer.json'
    whole = path.read_bytes()
    rng = np.random.default_rng(3)
    opened = checkpoint.open_step(workdir / 'checkpoints')
    for position in rng.integers(len(whole), size=200):
        changed = bytearray(whole)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(changed))
        with pytest.raises(UserError, match=r'tokenizer\.json is not the one .* put that one back'):
            restoring.load_tokenizer(opened)
    (row,) = checkpoint.list_steps(workdir / 'checkpoints')
    assert 'tokenizer.json is not the one' in row['damage']
    path.unlink()
    with pytest.raises(UserError, match='put that one back'):
        restoring.restore(workdir)
    path.write_bytes(whole)
    assert restoring.load_tokenizer(opened).vocab_size == 290
    (row,) = checkpoint.list_steps(workdir / 'checkpoints')
    assert row['damage'] == ''


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'tokenizer': 3}, 'names no tokenizer'),
        ({'tokenizer': '../tokenizer.json'}, 'names no tokenizer'),
        ({'tokenizer': '/etc/tokenizer.json'}, 'names no tokenizer'),
        ({'tokenizer_files': [1]}, 'names no tokenizer'),
        ({'tokenizer_files': {'../../x': 'y'}}, 'is not the one'),
        ({'tokenizer_files': {'tokenizer.json': None}}, 'is not the one'),
        ({'config': None}, 'config in checkpoint .*/3 cannot be used'),
        ({'config': {'model': [1]}}, 'config in checkpoint .*/3 cannot be used'),
        ({'config': {'model': {'num_layers': 'x'}}}, 'num_layers'),
    ],
    ids=str,
)
def test_metadata_of_odd_types_is_one_line(workdir, changes, message):
    change_metadata(workdir, **changes)
    with pytest.raises(UserError, match=message) as caught:
        restoring.restore(workdir)
    assert '\n' not in str(caught.value)


def test_a_checkpoint_of_format_1_loads_with_the_tokenizer_that_is_there(workdir):
    folder = workdir / 'checkpoints/3'
    metadata = json.loads((folder / 'metadata/metadata').read_text())
    del metadata['tokenizer_files']
    (folder / 'metadata/metadata').write_text(json.dumps(metadata | {'format_version': 1}))
    manifest.write(epath.Path(folder))
    listed = json.loads((folder / 'manifest.json').read_text())['files']
    (folder / 'manifest.json').write_text(json.dumps(listed, indent=0))
    assert restoring.restore(workdir, mesh=mesh_of('one')).tokenizer.vocab_size == 290


def test_a_config_of_before_gate_input_means_both(workdir):
    saved = restoring.read_metadata(workdir)['config']
    assert saved['model']['gmu'].pop('gate_input') == 'input'
    change_metadata(workdir, config=saved)
    opened = checkpoint.open_step(workdir / 'checkpoints', 'latest')
    assert restoring.saved_config(opened).model.gmu.gate_input == 'both'


@pytest.mark.parametrize(
    ('weights', 'item'), [('auto', 'ema'), ('ema', 'ema'), ('trained', 'params')]
)
def test_only_the_weights_that_are_asked_for_are_read(weights, item, tmp_path, caplog):
    small_checkpoints.write(tmp_path, [20])
    for unread in {'params', 'ema', 'optimizer'} - {item}:
        shutil.rmtree(tmp_path / f'checkpoints/20/{unread}')
    caplog.set_level('INFO')
    restored = restoring.restore(tmp_path, weights=weights, mesh=mesh_of('one'))
    expected = small_checkpoints.numbers(20)
    jax.tree.map(np.testing.assert_array_equal, restored.variables['params'], expected[item])
    jax.tree.map(np.testing.assert_array_equal, restored.variables['router'], expected['router'])
    assert ('Reading the average of the weights' in caplog.text) == (weights == 'auto')


def test_weights_that_are_not_there_are_refused(tmp_path):
    write(tmp_path, 'one')
    with pytest.raises(UserError, match=r'weights=ema, but .* has no average'):
        restoring.restore(tmp_path, weights='ema')
    with pytest.raises(UserError, match=r"weights='emma'.*Did you mean 'ema'"):
        restoring.restore(tmp_path, weights='emma')


def test_a_step_whose_average_is_damaged_is_passed_over(tmp_path, caplog):
    small_checkpoints.write(tmp_path, [20, 40])
    small_checkpoints.damage(tmp_path, 40, 'ema')
    restored = restoring.restore(tmp_path, mesh=mesh_of('one'))
    given, expected = restored.variables['params'], small_checkpoints.numbers(20)['ema']
    assert flat(given).keys() == flat(expected).keys()
    jax.tree.map(np.testing.assert_array_equal, given, expected)
    assert '40 IS DAMAGED: ema/' in caplog.text
    trained = restoring.restore(tmp_path, weights='trained', mesh=mesh_of('one'))
    expected = small_checkpoints.numbers(40)['params']
    jax.tree.map(np.testing.assert_array_equal, trained.variables['params'], expected)
