import errno
import os
import resource
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from helios_jax import paths
from helios_jax.data import manifest, records
from helios_jax.errors import UserError

LENGTHS = (3, 1, 5)


def write(directory: epath.Path) -> tfds.core.DatasetInfo:
    """A data set of three shards whose examples are their numbers."""
    directory.mkdir(parents=True, exist_ok=True)
    number, shards = 0, []
    for index, length in enumerate(LENGTHS):
        path = directory / records.shard_name('numbers', 'some', index)
        examples = [{'text': f'№ {number + i}'.encode(), 'n': number + i} for i in range(length)]
        with records.shard(path, examples) as written:
            shards.append(written)
        number += length
    identity = tfds.core.DatasetIdentity(
        name='numbers', version=tfds.core.Version('1.0.0'), data_dir=str(directory), module_name=''
    )
    features = {'text': tfds.features.Text(), 'n': tfds.features.Scalar(np.int64)}
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    info.set_file_format('array_record')
    split = manifest.split_info(directory, 'numbers', 'some', shards)
    info.set_splits(tfds.core.SplitDict([split]))
    info.write_to_directory(directory)
    return tfds.builder_from_directory(directory).info


@pytest.mark.parametrize('in_a_bucket', [False, True])
def test_what_was_written_is_read(tmp_path, monkeypatch, in_a_bucket):
    directory = epath.Path(tmp_path) / 'numbers'
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    if in_a_bucket:  # then array_record may open nothing below the directory itself
        monkeypatch.setattr(paths, 'is_local', lambda path: 'numbers/' not in str(path))
    source = records.Records(write(directory), 'some')
    assert len(source) == sum(LENGTHS) and source.shard_lengths == list(LENGTHS)
    assert [source[i]['n'] for i in range(len(source))] == list(range(len(source)))
    by_shard = [e['n'] for shard in range(len(LENGTHS)) for e in source.shard(shard, chunk=2)]
    assert by_shard == list(range(len(source)))
    assert source[4]['text'].decode() == '№ 4'
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]
    copies = list((epath.Path(tmp_path) / 'temporary').glob('helios/*'))
    assert len(copies) == (len(LENGTHS) if in_a_bucket else 0)
    assert not [path for path in directory.iterdir() if path.name.endswith('.part')]


def test_tfds_reads_them_too(tmp_path):
    write(epath.Path(tmp_path))
    source = tfds.builder_from_directory(tmp_path).as_data_source('some')
    assert [example['n'] for example in source] == list(range(sum(LENGTHS)))


@pytest.mark.parametrize('damage', ['missing', 'emptied', 'cut short', 'flipped'])
@pytest.mark.parametrize('opened_before', [False, True])
def test_a_damaged_shard_is_named_when_it_is_read(tmp_path, damage, opened_before):
    directory = epath.Path(tmp_path)
    source = records.Records(write(directory), 'some')
    if opened_before:
        assert source[5]['n'] == 5
    path = directory / records.shard_name('numbers', 'some', 2)
    content = bytearray(path.read_bytes())
    place = content.index('№ 7'.encode())
    if damage == 'missing':
        path.unlink()
    elif damage == 'flipped':
        content[place] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: place if damage == 'cut short' else 0])
    assert source[3]['n'] == 3
    if damage == 'missing' and opened_before:  # an open file stays until it is closed
        assert source[7]['n'] == 7
        return
    for read in (lambda: source[7], lambda: list(source.shard(2))):
        with pytest.raises(UserError, match=rf'{path} is damaged \(.*--rebuild') as refused:
            read()
        assert '\n' not in str(refused.value)


def test_what_cannot_be_written_is_named(tmp_path):
    """A limit on the size of files fails as a full disk does."""
    path = epath.Path(tmp_path) / 'shard'
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=rf'{path} could not be written: .*data\.cache_dir'),
            records.shard(path, [{'text': os.urandom(300_000)}]),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(UserError, match=r'/nowhere could not be written: Read-only file system'),
        records.writing(path),
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), '/nowhere')


def test_a_shard_that_fails_gets_no_name(tmp_path):
    path = epath.Path(tmp_path) / 'shard'
    with pytest.raises(ZeroDivisionError), records.shard(path, [{'n': 1}]):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_digest_depends_on_every_value():
    digests = {records.digest(*values) for values in ((1, 2), (1,), (12,), ('1', 2), ([1, 2],))}
    assert len(digests) == 5
    assert records.digest({'a': 1, 'b': 2}) == records.digest({'b': 2, 'a': 1})
