"""Averages and exports are exact, can be read, and leave what they are made of as it was."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_checkpoints
from folders import entries
from refusals import refused
from small_checkpoints import arrays, flat, numbers

from helios_jax import checkpoint, cli, restoring
from helios_jax.arch.weights import all_weights, read_in_compute_dtype
from helios_jax.checkpoint import stream
from helios_jax.errors import UserError
from helios_jax.train import resume

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.slow
def test_an_average_is_the_float64_mean_rounded_once(original, tmp_path):
    before = entries(original)
    new = tmp_path / 'mean'
    cli.main(['ckpt', 'average', str(original), '--last=3', f'--to={new}'])
    assert entries(original) == before
    for item in ('params', 'router'):
        steps = [flat(numbers(step)[item]) for step in (20, 40, 60)]
        for name, array in arrays(new, item).items():
            expected = np.mean([step[name] for step in steps], axis=0, dtype=np.float64)
            np.testing.assert_array_equal(array, expected.astype(np.float32), name)
            assert array.dtype == np.float32
    opened = checkpoint.open_step(new / 'checkpoints')
    assert (opened.step, opened.items) == (60, ('params', 'router'))
    made_from = {'command': 'average', 'steps': [20, 40, 60], 'item': 'params'}
    assert opened.metadata['made_from'] == made_from and opened.metadata['metrics'] == {}
    restored = restoring.restore(new, mesh=small_checkpoints.mesh())
    given = flat(jax.device_get(restored.variables['params']))
    jax.tree.map(np.testing.assert_array_equal, given, arrays(new, 'params'))
    assert restored.tokenizer.vocab_size == small_checkpoints.VOCABULARY
    folders = [checkpoint.tokenizer_directory(w / 'checkpoints') for w in (original, new)]
    held, copied = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders)
    assert copied == held and held.keys() == {'tokenizer.json', 'tokenizer_config.json'}


def test_the_average_of_one_step_is_that_step_bit_for_bit(original, tmp_path):
    new = tmp_path / 'mean'
    cli.main(['ckpt', 'average', str(original), '--steps=40', '--weights=ema', f'--to={new}'])
    assert arrays(new, 'params').keys() == flat(numbers(40)['ema']).keys()
    for item, source in (('params', 'ema'), ('router', 'router')):
        jax.tree.map(np.testing.assert_array_equal, arrays(new, item), flat(numbers(40)[source]))
    assert checkpoint.open_step(new / 'checkpoints').step == 40


@pytest.mark.slow
def test_an_export_is_rounded_to_bfloat16_and_read_as_a_steps_copy_is(original, tmp_path, caplog):
    before = entries(original)
    new = tmp_path / 'export'
    cli.main(['ckpt', 'export', f'{original}/checkpoints/40', '--weights=trained', f'--to={new}'])
    assert entries(original) == before
    exact = flat(numbers(40)['params'])
    rounded = {name: np.asarray(jnp.asarray(x).astype(jnp.bfloat16)) for name, x in exact.items()}
    stored = arrays(new, 'params')
    jax.tree.map(np.testing.assert_array_equal, stored, rounded)
    assert {x.dtype for x in stored.values()} == {jnp.bfloat16.dtype}
    jax.tree.map(np.testing.assert_array_equal, arrays(new, 'router'), flat(numbers(40)['router']))
    restored = restoring.restore(new, mesh=small_checkpoints.mesh())
    given = flat(jax.device_get(restored.variables['params']))
    for weight in all_weights(restored.config.model):
        narrow = read_in_compute_dtype(weight.axes)
        assert given[weight.name].dtype == (jnp.bfloat16 if narrow else np.float32), weight
        np.testing.assert_array_equal(given[weight.name], rounded[weight.name], weight.name)
    assert len({x.dtype for x in given.values()}) == 2
    opened = checkpoint.open_step(new / 'checkpoints')
    begun = flat(resume.load(small_checkpoints.setup(), opened, 'params')['params'])
    assert {x.dtype for x in begun.values()} == {np.dtype('float32')}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(begun), rounded)
    with pytest.raises(UserError, match=r'without an optimizer.*train\.init_from='):
        resume.own_step(checkpoint.absolute(new), small_checkpoints.CONFIG)
    assert 'average' not in caplog.text


def test_an_export_takes_the_average_of_the_weights_where_there_is_one(original, tmp_path, capsys):
    cli.main(['ckpt', 'export', str(original), f'--to={tmp_path}/export'])
    assert 'Wrote ema of step 60' in capsys.readouterr().out
    rounded = {n: x.astype(jnp.bfloat16) for n, x in flat(numbers(60)['ema']).items()}
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / 'export', 'params'), rounded)


def test_arrays_are_made_one_at_a_time(original, tmp_path, monkeypatch):
    """An array is on disk before the next is read."""
    read, names = stream.StoredItem.read, []

    def noted(self, name):
        files = (tmp_path / 'export').rglob('*')
        names.append((name, sum(p.stat().st_size for p in files if p.is_file())))
        return read(self, name)

    monkeypatch.setattr(stream.StoredItem, 'read', noted)
    cli.main(['ckpt', 'export', str(original), f'--to={tmp_path}/export'])
    sizes = dict(names)
    assert len(names) == len(sizes) > 20
    assert all(a < b for a, b in zip(list(sizes.values()), list(sizes.values())[1:], strict=False))


def test_other_settings_shapes_or_tokenizers_are_refused(workdir, capsys):
    path = workdir / 'checkpoints/40/metadata/metadata'
    whole = json.loads(path.read_text())
    config = {**whole['config'], 'optimizer': {**whole['config']['optimizer'], 'beta1': 0.8}}
    arrays = json.loads(json.dumps(whole['arrays']).replace('[24, 40]', '[40, 24]'))
    for change, message in (
        ({'config': config}, 'optimizer.beta1 of step 40 differs from that of step 60'),
        ({'arrays': arrays}, 'arrays of step 40 differ'),
        ({'tokenizer_files': {}}, 'tokenizer_files of step 40 differ'),
    ):
        path.write_text(json.dumps(whole | change))
        checkpoint.manifest.write(checkpoint.absolute(workdir) / 'checkpoints/40')
        new = workdir.parent / 'mean'
        assert message in refused(
            capsys, 'ckpt', 'average', str(workdir), '--last=2', f'--to={new}'
        )
        assert not new.exists()


def test_damage_is_refused_and_nothing_is_left(workdir, capsys):
    name = small_checkpoints.damage(workdir, 40)
    before = entries(workdir)
    for there in (False, True):
        new = workdir.parent / 'new'
        if there:
            new.mkdir()
        for command in (['average', '--last=3'], ['export', '--step=40', '--weights=trained']):
            line = refused(capsys, 'ckpt', command[0], str(workdir), *command[1:], f'--to={new}')
            assert f'/d/{name} has changed' in line
            assert new.exists() == there and not (there and any(new.iterdir()))
    assert entries(workdir) == before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--last=2'], '--to is missing'),
        (['--last=2', '--to={run}/mean'], 'lies inside'),
        (['--last=2', '--to={run}/checkpoints'], 'lies inside'),
        (['--last=2', '--to={taken}'], 'is there already'),
        (['--last=2', '--to={taken}/file'], 'is there already'),
        (['--last=4', '--to={new}'], 'holds 3 steps'),
        (['--last=-1', '--to={new}'], '--last=-1'),
        (['--last=2', '--steps=20', '--to={new}'], 'give one of the two'),
        (['--to={new}'], 'give one of the two'),
        (['--steps=20,x', '--to={new}'], 'must be numbers'),
        (['--steps=20,30', '--to={new}'], 'step=30 is not in'),
        (['--last=2', '--weights=best', '--to={new}'], "weights='best'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_leaves_everything_as_it_was(
    arguments, message, original, tmp_path, capsys
):
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken/file').write_text('mine')
    names = {'run': original, 'taken': tmp_path / 'taken', 'new': tmp_path / 'new'}
    before = entries(original, tmp_path)
    filled = [argument.format(**names) for argument in arguments]
    assert message in refused(capsys, 'ckpt', 'average', str(original), *filled)
    assert entries(original, tmp_path) == before
