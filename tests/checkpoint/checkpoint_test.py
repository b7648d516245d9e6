"""Restoring: bit by bit on any mesh; what is damaged, foreign or missing is said."""

import functools
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from small_steps import abstract, contents, files, flip_bit, params, same, write

from helios_jax import checkpoint
from helios_jax.checkpoint import layout
from helios_jax.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_compilation')


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
    before = contents(tmp_path)
    write(tmp_path, [4])
    after = contents(tmp_path)
    assert {path: entry for path, entry in after.items() if path in before} == before


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


def test_bfloat16_is_widened_where_float32_is_wanted_and_never_the_reverse(tmp_path):
    write(tmp_path, [1])
    wanted = params()
    wanted['layers']['gate'] = wanted['layers']['gate'].astype(jnp.float32)
    restored = checkpoint.open_step(tmp_path, 1).restore('params', abstract(wanted))
    expected = params(1)
    expected['layers']['gate'] = expected['layers']['gate'].astype(jnp.float32)
    assert same(restored, expected)


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
