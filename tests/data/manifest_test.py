import json

import pytest
import tensorflow_datasets as tfds
from etils import epath

from helios_jax.data import manifest, records
from helios_jax.errors import UserError

TEXTS = ['one', 'two', 'three', 'four', 'five']
SMALL = ['dataset_info.json', 'features.json', 'metadata.json', 'manifest.json']


@pytest.fixture
def directory(tmp_path) -> epath.Path:
    """A complete data set of two shards."""
    path = epath.Path(tmp_path) / 'made'
    path.mkdir()
    shards = []
    for index, texts in enumerate((TEXTS[:2], TEXTS[2:])):
        name = records.shard_name('numbers', 'some', index)
        with records.shard(path / name, [{'text': text.encode()} for text in texts]) as written:
            shards.append(written)
    features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
    assert not manifest.is_complete(path)
    manifest.complete(path, 'numbers', features, {'count': 5}, {'some': shards})
    assert manifest.is_complete(path)
    return path


def test_what_was_completed_is_a_data_set_that_passes(directory):
    manifest.verify(directory)
    info = tfds.builder_from_directory(directory).info
    source = records.Records(info, 'some')
    assert [source[index]['text'].decode() for index in range(5)] == TEXTS
    assert info.metadata == {'count': 5}
    assert not list(directory.glob('*.part'))


@pytest.mark.parametrize('name', SMALL)
def test_any_flipped_bit_of_a_small_file_is_found(directory, name):
    content = (directory / name).read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (directory / name).write_bytes(flipped)
        with pytest.raises(UserError, match=r'is damaged .*--rebuild'):
            manifest.verify(directory)
    (directory / name).write_bytes(content)
    manifest.verify(directory)


@pytest.mark.parametrize('content', [b'', b'null', b'[1, 2]', b'{}', b'[' * 9999, b'\xff', b'{"a'])
def test_a_manifest_that_is_none_is_damage(directory, content):
    (directory / 'manifest.json').write_bytes(content)
    with pytest.raises(UserError, match=r'manifest\.json is damaged'):
        manifest.verify(directory)


@pytest.mark.parametrize('damage', ['missing', 'emptied', 'cut short', 'longer'])
@pytest.mark.parametrize('index', [0, 1])
def test_a_shard_of_another_size_is_named(directory, damage, index):
    path = directory / records.shard_name('numbers', 'some', index)
    content = path.read_bytes()
    changed = {'emptied': b'', 'cut short': content[:-1], 'longer': content + b'0'}
    path.unlink() if damage == 'missing' else path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=rf'{path} is damaged .*{len(content)} bytes were written'):
        manifest.verify(directory)


def test_a_directory_in_a_files_place_is_named(directory):
    (directory / 'features.json').unlink()
    (directory / 'features.json').mkdir()
    with pytest.raises(UserError, match=r'features\.json is damaged'):
        manifest.verify(directory)


def test_files_of_others_are_left_alone(directory):
    (directory / 'notes.txt').write_text('mine')
    manifest.verify(directory)
    assert 'notes.txt' not in json.loads((directory / 'manifest.json').read_text())['sizes']
