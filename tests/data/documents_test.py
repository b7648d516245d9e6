import os

import pytest
import tensorflow_datasets as tfds
from etils import epath

from helios_jax.data import corpora, documents
from helios_jax.errors import UserError


def read_back(split: documents.Documents) -> list[corpora.Document]:
    return [document for shard in split.shards() for document in shard]


def test_every_document_is_in_one_split(corpus, cache_dir):
    splits = documents.prepare(corpus, cache_dir, 0.3)
    stored = {name: read_back(split) for name, split in splits.items()}
    everything = list(corpora.read(corpus))
    assert sorted(stored['train'] + stored['validation']) == sorted(everything)
    assert stored['train'] == [d for d in everything if d in set(stored['train'])]
    assert 4 < len(stored['validation']) < 40
    for name, split in splits.items():
        assert split.num_documents == len(stored[name])
        assert split.num_bytes == sum(len(d.text.encode()) for d in stored[name])
        assert split.num_prompts == 0


def test_split_depends_on_content_alone(corpus, cache_dir):
    held_out = set(read_back(documents.prepare(corpus, cache_dir, 0.2)['validation']))
    files = sorted(epath.Path(corpus).parent.iterdir())
    for number, path in enumerate(files):
        path.rename(path.with_name(f'{len(files) - number:03d}-renamed.txt'))
    renamed = documents.prepare(corpus, cache_dir, 0.2)['validation']
    assert set(read_back(renamed)) == held_out
    more = documents.prepare(corpus, cache_dir, 0.4)['validation']
    assert held_out < set(read_back(more))


def test_tfds_reads_it_from_its_directory(corpus, cache_dir):
    split = documents.prepare(corpus, cache_dir, 0.2)['train']
    builder = tfds.builder_from_directory(split.directory)
    assert builder.info.name == 'helios_text'
    source = builder.as_data_source('train')
    assert [example['text'].decode() for example in source] == [d.text for d in read_back(split)]
    assert builder.info.splits['train'].num_shards > 2


def test_prepared_once_until_a_file_changes(corpus, cache_dir, monkeypatch):
    first = documents.prepare(corpus, cache_dir, 0.2)
    with monkeypatch.context() as context:
        context.setattr(corpora, 'read', None)
        assert documents.prepare(corpus, cache_dir, 0.2) == first
    changed = next(epath.Path(corpus).parent.iterdir())
    changed.write_text(changed.read_text() + ' and more')
    second = documents.prepare(corpus, cache_dir, 0.2)
    assert [s.fingerprint for s in first.values()] != [s.fingerprint for s in second.values()]


def test_two_corpora_of_one_name_size_and_time_stay_apart(tmp_path, cache_dir, monkeypatch):
    found = []
    for directory, text in (('d1', 'one'), ('d2', 'two')):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / 'c.txt').write_text(text)
        os.utime(tmp_path / directory / 'c.txt', ns=(0, 10**18))
        monkeypatch.chdir(tmp_path / directory)
        found += read_back(documents.prepare('c.txt', cache_dir, 0.0)['train'])
    assert [document.text for document in found] == ['one', 'two']


def test_an_edit_at_once_of_equal_size_and_time_is_read(tmp_path, cache_dir):
    path = tmp_path / 'c.txt'
    for text in ('one', 'two', 'six', 'ten'):
        path.write_text(text)
        os.utime(path, ns=(0, 10**18))
        (document,) = read_back(documents.prepare(str(path), cache_dir, 0.0)['train'])
        assert document.text == text


def test_equal_text_elsewhere_has_an_equal_fingerprint(tmp_path, cache_dir):
    for name in ('a.txt', 'b.txt'):
        (tmp_path / name).write_text('the same')
    one, two = (
        documents.prepare(str(tmp_path / name), cache_dir, 0.0)['train']
        for name in ('a.txt', 'b.txt')
    )
    assert one.directory != two.directory and one.fingerprint == two.fingerprint


def test_a_corpus_that_changes_while_it_is_read_is_refused(corpus, cache_dir, monkeypatch):
    read = corpora.read

    def changing(name):
        yield from read(name)
        next(epath.Path(corpus).parent.iterdir()).write_text('other')

    monkeypatch.setattr(corpora, 'read', changing)
    with pytest.raises(UserError, match='was changed while it was read'):
        documents.prepare(corpus, cache_dir, 0.2)
    assert not list(cache_dir.glob('documents/*/*'))


def test_damage_is_named_and_rebuilding_mends_it(corpus, cache_dir):
    first = documents.prepare(corpus, cache_dir, 0.2)
    whole = read_back(first['train'])
    shard = next(first['train'].directory.glob('*train*'))
    shard.write_bytes(b'')
    with pytest.raises(UserError, match=rf'{shard} is damaged .*--rebuild'):
        documents.prepare(corpus, cache_dir, 0.2)
    with pytest.raises(UserError, match=rf'{shard} is damaged .*--rebuild'):
        read_back(first['train'])
    assert documents.prepare(corpus, cache_dir, 0.2, rebuild=True) == first
    assert read_back(first['train']) == whole
    assert documents.prepare(corpus, cache_dir, 0.2) == first


def test_without_validation(corpus, cache_dir):
    splits = documents.prepare(corpus, cache_dir, 0.0)
    assert list(splits) == ['train']
    assert splits['train'].num_documents == 61


def test_corpora_that_cannot_be_split(tmp_path, cache_dir):
    (tmp_path / 'a.txt').touch()
    with pytest.raises(UserError, match=r'a\.txt.*is empty'):
        documents.prepare(str(tmp_path / 'a.txt'), cache_dir, 0.2)
    (tmp_path / 'a.txt').write_text('the only one')
    for fraction, split in ((1e-9, 'validation'), (1 - 1e-9, 'train')):
        with pytest.raises(UserError, match=f'none of its 1 documents is in the {split} split'):
            documents.prepare(str(tmp_path / 'a.txt'), cache_dir, fraction)
    assert not list(cache_dir.glob('documents/*/*'))


def test_failing_half_way_leaves_nothing_that_looks_prepared(corpus, cache_dir):
    bad = epath.Path(corpus).parent / '060.txt'
    good = bad.read_bytes()
    bad.write_bytes(b'\xff')
    with pytest.raises(UserError, match=r'060\.txt is not UTF-8'):
        documents.prepare(corpus, cache_dir, 0.2)
    bad.write_bytes(good)
    assert documents.prepare(corpus, cache_dir, 0.2)['train'].num_documents > 30
