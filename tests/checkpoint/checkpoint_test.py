import functools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from helios_jax import checkpoint
from helios_jax.checkpoint import layout, manifest
from helios_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compilation')


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    return {
        'layers': {'q': draw(8, 16, 3), 'gate': draw(8, 5).astype(jnp.bfloat16)},
        'ids': jnp.arange(24, dtype=jnp.int32).reshape(8, 3),
        'bytes': jnp.arange(16, dtype=jnp.uint8),
        'scale': jnp.float32(0.1),
    }


def abstract(tree, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def same(a, b) -> bool:
    """Equal in structure, dtype and every bit."""
    bits = lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(bits, a, b))


def write(directory, steps, *, keep=9, scores=None, metadata=None) -> None:
    writer = checkpoint.Checkpoints(directory, keep=keep)
    for step in steps:
        metrics = {'bits_per_byte': scores[step]} if scores and step in scores else None
        writer.save(step, {'params': params(step)}, metadata or {}, metrics)
    writer.close()


def flip_bit(folder: epath.Path) -> str:
    """Flips one bit in the middle of the largest file; returns its name."""
    files = manifest.files(folder)
    path = max(files.values(), key=lambda p: p.stat().length)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    return path.name


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def tree(folder) -> dict[str, tuple]:
    """Everything below, with contents, sizes and times of change; folders' times left out."""
    return {
        str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else ()
        for p in sorted(folder.rglob('*'))
    }


def refuse(*args, **kwargs):
    raise OSError(28, 'No space left on device')


def test_round_trip_is_bit_exact_in_every_dtype_and_item(tmp_path):
    state = optax.adamw(1e-3).init(params())
    items = {'params': params(), 'optimizer': state, 'state': {'bias': jnp.arange(7.0)}}
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(3, items, {'config': {'model': {'num_layers': 2}}}, {'bits_per_byte': 1.5})
    writer.close()
    for name, tree in items.items():
        assert same(checkpoint.open_step(tmp_path, 3).restore(name, abstract(tree)), tree)
    metadata = checkpoint.open_step(tmp_path, 'latest').metadata
    assert metadata['config'] == {'model': {'num_layers': 2}}
    assert metadata['metrics'] == {'bits_per_byte': 1.5}
    assert (metadata['step'], metadata['format_version']) == (3, checkpoint.FORMAT_VERSION)


def test_parameters_are_restored_without_reading_the_rest(tmp_path):
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': params(), 'optimizer': {'mu': jnp.ones((9, 4))}}, {})
    writer.close()
    (tmp_path / '1/optimizer').rename(tmp_path / 'moved')
    assert same(checkpoint.open_step(tmp_path, 1).restore('params', abstract(params())), params())


@pytest.mark.parametrize('shape', [(1, 1), (2, 4), (8, 1), (1, 2)])
def test_any_mesh_restores_what_eight_fsdp_devices_wrote(tmp_path, shape):
    def place(tree, mesh):
        def of(x):
            axes = ('fsdp', 'tensor')[: max(0, x.ndim - 1)]
            return NamedSharding(mesh, PartitionSpec(*axes))

        return jax.tree.map(of, tree)

    writing = jax.make_mesh((8, 1), ('fsdp', 'tensor'))
    arrays = jax.device_put(params(), place(params(), writing))
    assert len(arrays['layers']['q'].addressable_shards) == 8
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': arrays}, {})
    writer.close()
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ('fsdp', 'tensor'), devices=devices)
    shardings = place(params(), mesh)
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params(), shardings
    )
    restored = checkpoint.open_step(tmp_path, 'latest').restore('params', wanted)
    assert same(restored, params())
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, restored, shardings))


def test_donating_the_arrays_during_a_save_does_not_change_it(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    arrays = {'w': jnp.arange(1 << 20, dtype=jnp.float32).reshape(1024, 1024)}
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': arrays}, {})
    for _ in range(3):
        arrays = step(arrays)
    writer.close()
    restored = checkpoint.open_step(tmp_path, 1).restore('params', abstract(arrays))
    assert np.array_equal(restored['w'].reshape(-1), np.arange(1 << 20))


def test_flipped_bit_is_an_error_by_number_and_passed_over_by_latest(tmp_path, caplog):
    write(tmp_path, [1, 2, 3])
    name = flip_bit(epath.Path(tmp_path) / '3')
    with pytest.raises(UserError, match=f'{name} has changed'):
        checkpoint.open_step(tmp_path, 3).restore('params', abstract(params()))
    opened = checkpoint.open_step(tmp_path, 'latest', ['optimizer', 'params'])
    assert same(opened.restore('params', abstract(params())), params(2))
    assert 'DAMAGED' in caplog.text and name in caplog.text
    assert [bool(row['damage']) for row in checkpoint.list_steps(tmp_path)] == [False, False, True]


def test_damaged_metadata_is_an_error(tmp_path):
    write(tmp_path, [1], metadata={'config': {'seed': 1}})
    path = tmp_path / '1/metadata/metadata'
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(UserError, match='damaged'):
        checkpoint.open_step(tmp_path, 1)


def test_nothing_intact_is_an_error_and_not_a_fresh_start(tmp_path):
    write(tmp_path, [1])
    flip_bit(epath.Path(tmp_path) / '1')
    with pytest.raises(UserError, match='every checkpoint'):
        checkpoint.open_step(tmp_path, 'latest', ['params'])


def test_run_that_fell_back_writes_the_damaged_step_again_and_keeps_the_old_one(tmp_path):
    write(tmp_path, [1, 2])
    for number in ('', '.2'):
        name = flip_bit(epath.Path(tmp_path) / '2')
        damaged = files(tmp_path / '2')
        write(tmp_path, [2])
        assert name and files(tmp_path / f'2.damaged{number}') == damaged
    assert same(checkpoint.open_step(tmp_path, 2).restore('params', abstract(params())), params(2))


def test_step_that_exists_is_not_written_over(tmp_path):
    write(tmp_path, [1, 4])
    writer = checkpoint.Checkpoints(tmp_path, keep=9)
    for step in (3, 4):
        with pytest.raises(UserError, match='exists already'):
            writer.save(step, {'params': params(9)}, {})
    assert writer.steps() == [1, 4]
    assert same(checkpoint.open_step(tmp_path, 4).restore('params', abstract(params())), params(4))


def test_what_a_killed_save_or_deletion_left_is_not_listed_and_is_removed_by_the_next_save(
    tmp_path, caplog
):
    caplog.set_level('INFO', 'helios_jax')
    write(tmp_path, [1])
    left = ['3.orbax-checkpoint-tmp', '40.orbax-checkpoint-tmp-1764000000', '2.unfinished']
    for name in left:
        (tmp_path / name / 'params').mkdir(parents=True)
    assert checkpoint.open_step(tmp_path, 'latest').step == 1
    assert [row['step'] for row in checkpoint.list_steps(tmp_path)] == [1]
    before = tree(tmp_path)
    writer = checkpoint.Checkpoints(tmp_path, keep=9)
    writer.close()
    assert tree(tmp_path) == before
    write(tmp_path, [5])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '5', 'helios_checkpoints.json']
    for name in left:
        assert name.split('.')[0] in caplog.text


FOREIGN = [
    '2026', '7', '040', '4²', '٤٠', 'notes.orbax-checkpoint-tmp', '04.orbax-checkpoint-tmp',
    'x.unfinished', 'tokenizer',
]  # fmt: skip


def test_what_others_put_there_is_named_passed_over_and_kept(tmp_path, caplog):
    write(tmp_path, [1, 3])
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'notes.md').write_text('mine')
    (tmp_path / '8').write_text('a plain file')
    (tmp_path / '3/manifest.json').unlink()
    assert checkpoint.open_step(tmp_path).step == 1
    assert [row['step'] for row in checkpoint.list_steps(tmp_path)] == [1]
    for name in ('3', '7', '8', '2026'):
        assert f'{tmp_path / name} has no manifest.json and is passed over' in caplog.text
    before = tree(tmp_path)
    write(tmp_path, [4])
    after = tree(tmp_path)
    assert {path: entry for path, entry in after.items() if path in before} == before


@pytest.mark.parametrize('name', ['3', '7'])
def test_a_save_where_something_else_lies_is_refused_and_changes_nothing(tmp_path, name):
    write(tmp_path, [1, 3])
    (tmp_path / '3/manifest.json').unlink()
    (tmp_path / '7').write_text('a plain file')
    before = tree(tmp_path)
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    with pytest.raises(UserError, match=f'{name} is in the way.*no manifest.json.*move it away'):
        writer.save(int(name), {'params': params()}, {})
    writer.close()
    assert tree(tmp_path) == before


def test_step_is_listed_only_once_it_is_committed(tmp_path, monkeypatch):
    release = threading.Event()
    sha256 = manifest.sha256
    monkeypatch.setattr(manifest, 'sha256', lambda path: release.wait(60) and sha256(path))
    writer = checkpoint.Checkpoints(tmp_path, keep=9)
    writer.save(1, {'params': params()}, {})
    assert writer.steps() == []
    release.set()
    writer.wait()
    assert writer.steps() == [1]


@pytest.mark.parametrize('when', ['arrays', 'manifest'])
@pytest.mark.parametrize('met', ['wait', 'save', 'close'])
def test_failed_save_is_raised_once_and_leaves_the_last_one_intact(
    tmp_path, monkeypatch, when, met
):
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': params(1)}, {})
    writer.wait()
    with monkeypatch.context() as patch:
        if when == 'arrays':
            patch.setattr(ocp.CompositeCheckpointHandler, 'finalize', refuse)
        else:
            patch.setattr(manifest, 'sha256', refuse)
        writer.save(2, {'params': params(2)}, {})
        with pytest.raises(UserError, match='No space left'):
            writer.save(3, {'params': params(3)}, {}) if met == 'save' else getattr(writer, met)()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', 'helios_checkpoints.json']
    assert writer.steps() == [1]
    assert same(checkpoint.open_step(tmp_path, 1).restore('params', abstract(params())), params(1))
    if met != 'close':
        writer.save(2, {'params': params(2)}, {})
        writer.close()
        assert writer.steps() == [2]


def test_newest_and_best_are_kept(tmp_path):
    write(tmp_path, range(1, 8), keep=2, scores={2: 1.9, 3: 1.2, 5: float('nan'), 6: 1.4})
    rows = checkpoint.list_steps(tmp_path)
    assert [row['step'] for row in rows] == [3, 6, 7]
    assert [row['metrics'] for row in rows] == [{'bits_per_byte': 1.2}, {'bits_per_byte': 1.4}, {}]
    assert all(row['bytes'] > 8 * 16 * 3 * 4 // 2 and not row['damage'] for row in rows)
    assert checkpoint.open_step(tmp_path, 'best').step == 3
    assert checkpoint.open_step(tmp_path, 'latest').step == 7


def test_of_equal_metrics_the_newest_is_best(tmp_path):
    write(tmp_path, [1, 2, 3], scores={1: 2.0, 2: 1.5, 3: 1.5})
    assert checkpoint.open_step(tmp_path, 'best').step == 3


def test_best_without_metrics_is_an_error(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(UserError, match='latest instead'):
        checkpoint.open_step(tmp_path, 'best')


@pytest.mark.parametrize(
    'read',
    [
        functools.partial(checkpoint.open_step, step='latest'),
        functools.partial(checkpoint.open_step, step=7),
        checkpoint.list_steps,
    ],
    ids=['latest', 'number', 'list_steps'],
)
def test_directory_that_is_none_is_an_error_and_stays_untouched(tmp_path, read):
    with pytest.raises(UserError, match='does not exist'):
        read(tmp_path / 'absent')
    assert not (tmp_path / 'absent').exists()
    (tmp_path / '7').mkdir()
    with pytest.raises(UserError, match='not a checkpoint directory'):
        read(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['7']


def test_object_store_paths_stay_what_they_are():
    assert str(checkpoint.tokenizer_directory('gs://bucket/run')) == 'gs://bucket/run/tokenizer'


def test_foreign_numbered_folders_are_never_taken_over(tmp_path):
    (tmp_path / '7').mkdir()
    (tmp_path / '7/thesis.txt').write_text('precious')
    with pytest.raises(UserError, match='7'):
        checkpoint.Checkpoints(tmp_path, keep=1)
    assert (tmp_path / '7/thesis.txt').read_text() == 'precious'


@pytest.mark.parametrize('step', [7, '7', 'newest'])
def test_unknown_step_lists_what_exists(tmp_path, step):
    write(tmp_path, [1, 12])
    with pytest.raises(UserError, match='one of 1, 12'):
        checkpoint.open_step(tmp_path, step)
    assert checkpoint.open_step(tmp_path, '12').step == 12


def test_directory_without_steps_is_an_error(tmp_path):
    layout.claim(epath.Path(tmp_path))
    assert checkpoint.Checkpoints(tmp_path, keep=1).steps() == []
    with pytest.raises(UserError, match='no complete checkpoint'):
        checkpoint.open_step(tmp_path, 'latest')


def test_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(layout, 'FORMAT_VERSION', checkpoint.FORMAT_VERSION + 1)
        write(tmp_path, [1])
    with pytest.raises(UserError, match='newer than'):
        checkpoint.open_step(tmp_path, 1)
    with pytest.raises(UserError, match='newer than'):
        checkpoint.open_step(tmp_path)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda p: p | {'ids': jnp.zeros((8, 4), jnp.int32)},
            r'ids is int32\[8, 3\].*int32\[8, 4\]',
        ),
        (lambda p: p | {'scale': jnp.bfloat16(1)}, r'scale is float32\[\].*bfloat16\[\]'),
        (lambda p: p | {'layers': {'q': p['layers']['q']}}, r'layers.gate is bfloat16.*nothing'),
        (lambda p: p | {'a': p['bytes']}, r' a is nothing .* uint8\[16\]'),
    ],
    ids=['shape', 'dtype', 'absent', 'added'],
)
def test_tree_that_differs_names_the_array_and_both_shapes(tmp_path, change, message):
    write(tmp_path, [1])
    with pytest.raises(UserError, match=message):
        checkpoint.open_step(tmp_path, 1).restore('params', abstract(change(params())))


def test_unknown_item_lists_what_exists(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(UserError, match="no 'optimizer'; it holds params"):
        checkpoint.open_step(tmp_path, 1).restore('optimizer', abstract(params()))


def test_shapes_without_a_sharding_are_refused(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(ValueError, match='sharding'):
        checkpoint.open_step(tmp_path, 1).restore('params', jax.eval_shape(params))


def test_manifest_names_every_file_of_every_part(tmp_path):
    write(tmp_path, [1])
    listed = json.loads((tmp_path / '1/manifest.json').read_text())['files']
    assert set(listed) == {name for name in files(tmp_path / '1') if '/' in name}
    assert {name.split('/')[0] for name in listed} == {'params', 'metadata'}


@pytest.fixture
def object_store(monkeypatch):
    """Local folders taken for an object store, where nothing can be renamed at once."""
    monkeypatch.setattr(manifest, 'is_remote', lambda path: True)


def test_on_an_object_store_a_mark_tells_what_is_unfinished(tmp_path, object_store, monkeypatch):
    release, sha256 = threading.Event(), manifest.sha256
    write(tmp_path, [1])
    with monkeypatch.context() as patch:
        patch.setattr(manifest, 'sha256', lambda path: release.wait(60) and sha256(path))
        writer = checkpoint.Checkpoints(tmp_path, keep=9)
        writer.save(2, {'params': params()}, {})
        assert (tmp_path / '2.unfinished').is_file()
        release.set()
        writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2', 'helios_checkpoints.json']


def test_on_an_object_store_half_a_step_is_removed_if_it_is_marked_as_ours(
    tmp_path, object_store, caplog
):
    write(tmp_path, [1, 2, 3, 4])
    for step in (2, 3):
        (tmp_path / f'{step}/manifest.json').unlink()
    for step in (1, 3, 8):  # finished but for the mark, half deleted, not begun
        (tmp_path / f'{step}.unfinished').write_text('')
    assert [row['step'] for row in checkpoint.list_steps(tmp_path)] == [1, 4]
    assert f'{tmp_path}/2 has no manifest' in caplog.text
    assert f'{tmp_path}/3 has no manifest' not in caplog.text
    write(tmp_path, [5])
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ['1', '2', '4', '5', 'helios_checkpoints.json']


@pytest.mark.parametrize('remote', [False, True])
def test_deletion_that_fails_stops_no_save_and_is_made_up_for(tmp_path, monkeypatch, remote):
    if remote:
        monkeypatch.setattr(manifest, 'is_remote', lambda path: True)
    writer = checkpoint.Checkpoints(tmp_path, keep=1)
    writer.save(1, {'params': params()}, {})
    with monkeypatch.context() as patch:
        patch.setattr(type(writer.directory), 'rmtree', refuse)
        writer.save(2, {'params': params()}, {})
        writer.wait()
        assert [row['step'] for row in checkpoint.list_steps(tmp_path)] == [2]
        assert (tmp_path / '1.unfinished').exists()
    writer.save(3, {'params': params()}, {})
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['3', 'helios_checkpoints.json']
