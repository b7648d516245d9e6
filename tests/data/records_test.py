import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from helios_jax.data import records

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
    info.set_splits(tfds.core.SplitDict([records.split_info(directory, 'numbers', 'some', shards)]))
    info.write_to_directory(directory)
    return tfds.builder_from_directory(directory).info


@pytest.mark.parametrize('in_a_bucket', [False, True])
def test_what_was_written_is_read(tmp_path, monkeypatch, in_a_bucket):
    directory = epath.Path(tmp_path) / 'numbers'
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    if in_a_bucket:  # then array_record may open nothing below the directory itself
        monkeypatch.setattr(records, '_is_local', lambda path: 'numbers/' not in str(path))
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


def test_a_shard_that_fails_gets_no_name(tmp_path):
    path = epath.Path(tmp_path) / 'shard'
    with pytest.raises(ZeroDivisionError), records.shard(path, [{'n': 1}]):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_digest_depends_on_every_value():
    digests = {records.digest(*values) for values in ((1, 2), (1,), (12,), ('1', 2), ([1, 2],))}
    assert len(digests) == 5
    assert records.digest({'a': 1, 'b': 2}) == records.digest({'b': 2, 'a': 1})
