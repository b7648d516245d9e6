"""A checkpoint is what it says: what differs from it is named, and the step before is taken."""

import json
import random
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

from helios_jax import checkpoint
from helios_jax.checkpoint import manifest, read
from helios_jax.errors import UserError

STEPS = (3, 5)


def params(step: int) -> dict:
    return {
        'q': jnp.arange(35, dtype=jnp.float32).reshape(5, 7) * step,
        'gate': jnp.ones(11) / step,
    }


def optimizer(step: int) -> dict:
    return {'mu': jnp.full((13, 2), step, jnp.float32)}


@pytest.fixture(scope='module')
def written(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp('written')
    writer = checkpoint.Checkpoints(directory, keep=9)
    for step in STEPS:
        items = {'params': params(step), 'optimizer': optimizer(step)}
        writer.save(step, items, {'seed': 17}, {'bits_per_byte': 1 / step})
    writer.close()
    return directory


@pytest.fixture
def directory(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path / 'checkpoints')
    return tmp_path / 'checkpoints'


def abstract(tree):
    where = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def restored(opened: checkpoint.Opened) -> dict[str, np.ndarray]:
    return jax.device_get(opened.restore('params', abstract(params(1))))


def assert_passed_over(directory: Path, caplog, message: str, step: int = 5) -> None:
    """The damage is told by `ckpt ls`, by number, by latest and by best, which take step 3."""
    rows = {row['step']: row['damage'] for row in checkpoint.list_steps(directory)}
    assert rows[3] == '' and message in rows[step]
    for chosen in ('latest', 'best'):
        caplog.clear()
        assert checkpoint.open_step(directory, chosen, ['params', 'optimizer']).step == 3
    assert message in caplog.text
    with pytest.raises(UserError, match='damaged') as caught:
        checkpoint.open_step(directory, step).restore('params', abstract(params(1)))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', [4, 40])
def test_renamed_step_is_damage(directory, name, caplog):
    (directory / '5').rename(directory / str(name))
    rows = {row['step']: row['damage'] for row in checkpoint.list_steps(directory)}
    assert rows == {3: '', name: 'it is step 5 by its metadata; rename it back'}
    assert checkpoint.open_step(directory).step == 3
    assert 'it is step 5 by its metadata' in caplog.text
    with pytest.raises(UserError, match='step 5 by its metadata'):
        checkpoint.open_step(directory, name)


@pytest.mark.parametrize(
    'content',
    [
        b'{}', b'null', b'[1, 2]', b'{"params/x": 3}', b'\xff\xfe', b'', b'[' * 100_000,
        b'{"params/../../../../dev/zero": [0, "' + b'0' * 64 + b'"]}',
        b'{"/dev/zero": [0, "' + b'0' * 64 + b'"]}',
    ],
    ids=lambda content: str(content[:24]),
)  # fmt: skip
def test_manifest_that_is_not_one_is_damage(directory, content, caplog):
    (directory / '5/manifest.json').write_bytes(content)
    assert_passed_over(directory, caplog, 'manifest.json')


def metadata_without(name):
    def change(metadata):
        del metadata[name]
        return metadata

    return change


ODD_METADATA = {
    'nested lists': lambda _: '[' * 100_000,
    'no JSON': lambda _: '{"step": 5,',
    'a list': lambda _: [],
    'null': lambda _: None,
    **{f'no {name}': metadata_without(name) for name in ('step', 'arrays', 'metrics', 'time')},
    'no format': metadata_without('format_version'),
    'format in letters': lambda m: m | {'format_version': 'x'},
    'format as a truth': lambda m: m | {'format_version': True},
    'metric in letters': lambda m: m | {'metrics': {'bits_per_byte': 'x'}},
    'metric beyond floats': lambda m: m | {'metrics': {'bits_per_byte': 10**400}},
    'metrics in a list': lambda m: m | {'metrics': [1]},
    'step in letters': lambda m: m | {'step': '5'},
    'time as a number': lambda m: m | {'time': 5},
    'arrays in a list': lambda m: m | {'arrays': ['params']},
    'shape as a number': lambda m: m | {'arrays': {'params': {'q': 5}}},
    'item without files': lambda m: m | {'arrays': m['arrays'] | {'router': {}}},
}


@pytest.mark.parametrize('case', ODD_METADATA)
def test_metadata_of_odd_types_is_damage_though_its_hash_is_right(directory, case, caplog):
    path = directory / '5/metadata/metadata'
    changed = ODD_METADATA[case](json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    manifest.write(epath.Path(directory / '5'))
    assert_passed_over(directory, caplog, 'metadata' if 'files' not in case else 'router')


def test_orbax_metadata_that_is_no_json_is_one_line(directory):
    (directory / '5/params/_METADATA').write_text('not json\nat all')
    manifest.write(epath.Path(directory / '5'))
    with pytest.raises(UserError, match=r'params cannot be restored.*restore another') as caught:
        restored(checkpoint.open_step(directory, 5))
    assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_no_flipped_bit_of_a_steps_files_is_restored_silently(directory):
    draw = random.Random(5)
    expected = params(5)
    for path in sorted(p for p in (directory / '5').rglob('*') if p.is_file()):
        whole = path.read_bytes()
        for _ in range(5):
            changed = bytearray(whole)
            changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(changed))
            part = path.relative_to(directory / '5').parts[0]
            try:
                opened = checkpoint.open_step(directory, 5)
                damage = opened.damage(*opened.items)
            except UserError as error:
                damage = str(error)
            if part.startswith(('_', 'commit')):  # Orbax's own, which nothing reads
                assert damage == ''
                jax.tree.map(np.testing.assert_array_equal, restored(opened), expected)
            else:
                assert path.name in damage, path
            if part == 'params':
                with pytest.raises(checkpoint.DamageError, match=path.name):
                    restored(checkpoint.open_step(directory, 5))
        path.write_bytes(whole)


def test_arrays_are_read_while_they_are_hashed(directory, monkeypatch):
    sha256, read_arrays, reading = manifest.sha256, read._read, threading.Event()
    opened = checkpoint.open_step(directory, 5)
    monkeypatch.setattr(manifest, 'sha256', lambda path: reading.wait(60) and sha256(path))
    monkeypatch.setattr(read, '_read', lambda *args: reading.set() or read_arrays(*args))
    jax.tree.map(np.testing.assert_array_equal, restored(opened), params(5))


def test_damage_of_one_item_leaves_the_others_to_be_read(directory, caplog):
    path = max((directory / '5/optimizer/d').iterdir(), key=lambda p: p.stat().st_size)
    path.write_bytes(b'!' + path.read_bytes()[1:])
    opened = checkpoint.open_step(directory, 'latest', ['params', 'router'])
    assert opened.step == 5 and caplog.text == ''
    jax.tree.map(np.testing.assert_array_equal, restored(opened), params(5))
    with pytest.raises(UserError, match=f'{path.name} has changed'):
        opened.restore('optimizer', abstract(optimizer(1)))
    assert checkpoint.open_step(directory, 'latest', ['params', 'optimizer']).step == 3
    assert f'{path.name} has changed' in caplog.text


def test_item_is_hashed_once_by_whoever_opened_it_and_again_by_the_next(directory, monkeypatch):
    sha256, hashed = manifest.sha256, []
    monkeypatch.setattr(manifest, 'sha256', lambda path: hashed.append(path.name) or sha256(path))
    for _ in range(2):
        hashed.clear()
        opened = checkpoint.open_step(directory, 'latest', ['params'])
        restored(opened)
        restored(opened)
        files = [n for n in opened.files if n.startswith(('params/', 'metadata/'))]
        assert sorted(hashed) == sorted(name.rsplit('/', 1)[-1] for name in files)


def test_arrays_that_do_not_fit_are_refused_before_any_is_read(directory, monkeypatch):
    opened = checkpoint.open_step(directory)
    monkeypatch.setattr(manifest, 'sha256', lambda path: pytest.fail(f'{path} was read'))
    with pytest.raises(UserError, match=r'mu is float32\[13, 2\] .* nothing'):
        opened.require_fit('optimizer', abstract({}))


def test_step_that_a_run_lets_go_meanwhile_is_no_damage(directory, monkeypatch, caplog):
    fault = manifest.fault

    def let_go(folder, listed, part, **how):
        if folder.name == '5' and part == 'params' and folder.exists():
            folder.rename(folder.parent / '5.unfinished')
        return fault(folder, listed, part, **how)

    monkeypatch.setattr(manifest, 'fault', let_go)
    assert checkpoint.open_step(directory, 'latest', ['params']).step == 3
    (directory / '5.unfinished').rename(directory / '5')
    assert [row['step'] for row in checkpoint.list_steps(directory)] == [3]
    (directory / '5.unfinished').rename(directory / '5')
    with pytest.raises(UserError, match='was deleted while it was read'):
        restored(checkpoint.open_step(directory, 5))
    assert 'DAMAGED' not in caplog.text


def as_format_1(directory: Path, step: int) -> None:
    """Rewrites a step as version 1 wrote it: a bare manifest, and no hash of the tokenizer."""
    folder = directory / str(step)
    metadata = json.loads((folder / 'metadata/metadata').read_text())
    metadata.pop('tokenizer_files', None)
    (folder / 'metadata/metadata').write_text(json.dumps(metadata | {'format_version': 1}))
    manifest.write(epath.Path(folder))
    listed = json.loads((folder / 'manifest.json').read_text())['files']
    (folder / 'manifest.json').write_text(json.dumps(listed, indent=0))


def test_steps_of_format_1_are_restored(directory):
    as_format_1(directory, 5)
    opened = checkpoint.open_step(directory)
    assert (opened.step, opened.metadata['format_version']) == (5, 1)
    jax.tree.map(np.testing.assert_array_equal, restored(opened), params(5))
    assert [row['damage'] for row in checkpoint.list_steps(directory)] == ['', '']
