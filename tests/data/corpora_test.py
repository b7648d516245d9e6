import gzip
import importlib.util
import json
import os
import socket
import sys
from fractions import Fraction

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from helios_jax.data import corpora
from helios_jax.data.corpora import Document
from helios_jax.errors import UserError


def lines(*records: object) -> bytes:
    return b''.join(json.dumps(record).encode() + b'\n' for record in records)


@pytest.mark.parametrize(
    ('spec', 'expected'),
    [
        ('python_stdlib', [('python_stdlib', 1)]),
        ('docs/*.md', [('docs/*.md', 1)]),
        ('a=3, tfds:b=1', [('a', Fraction(3, 4)), ('tfds:b', Fraction(1, 4))]),
        ('x=1=.5,y=0.5', [('x=1', Fraction(1, 2)), ('y', Fraction(1, 2))]),
    ],
)
def test_parse(spec, expected):
    assert corpora.parse(spec) == expected


@pytest.mark.parametrize('spec', ['a=1,b', 'a=1,b=0', 'a=1,,b=2'])
def test_mixture_needs_weights(spec):
    with pytest.raises(UserError, match='needs a weight above 0'):
        corpora.parse(spec)


def test_files_and_records_gzipped_or_not(tmp_path):
    records = [
        {'text': 'one'},
        {'prompt': 'q', 'completion': 'a'},
        {'text': ''},
        {'text': '\u00e9'},
    ]
    (tmp_path / 'a.txt').write_bytes('windows\r\nlines, é'.encode())
    (tmp_path / 'b.md.gz').write_bytes(gzip.compress(b'# packed'))
    (tmp_path / 'c.jsonl').write_bytes(b'\n' + lines(*records))
    (tmp_path / 'd.JSONL.Gz').write_bytes(gzip.compress(lines(*records)))
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'deep.txt').write_text('deep')
    expected = [Document('', 'one'), Document('q', 'a'), Document('', 'é')]
    top = [Document('', 'windows\r\nlines, é'), Document('', '# packed'), *expected, *expected]
    assert list(corpora.read(str(tmp_path / '*'))) == top
    assert list(corpora.read(str(tmp_path / '**/*.txt'))) == [top[0], Document('', 'deep')]
    assert list(corpora.read(str(tmp_path / 'a.txt'))) == top[:1]
    assert ''.join(corpora.texts(str(tmp_path / 'c.jsonl'))) == 'oneqaé'


def test_stdlib_is_the_interpreters_without_tests():
    files = corpora._files('python_stdlib')
    assert sys.modules['json'].__file__ in map(str, files)
    for path in files:
        assert not {'test', 'tests', 'idle_test', 'site-packages'} & set(path.parts), path
    total = sum(path.stat().length for path in files)
    assert 5e6 < total < 30e6


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.txt', b'fine\xff', r'a\.txt is not UTF-8 text: byte 0xff at offset 4'),
        ('a.txt', b'zip\x00', r'a\.txt is not UTF-8 text: byte 0x00 at offset 3'),
        ('a.md.gz', b'plain', r'a\.md\.gz is not a whole gzip'),
        ('a.md.gz', gzip.compress(b'x' * 999, mtime=0)[:-9], r'a\.md\.gz is not a whole gzip'),
        ('a.jsonl', lines({'text': 'x'}) + b'{"text":', r'a\.jsonl:2 is not a JSON'),
        ('a.jsonl', b'{"text": "\xff"}', r'a\.jsonl:1 is not a JSON'),
        ('a.jsonl', lines({'texts': 'x'}), r'a\.jsonl:1 must have the string "text"'),
        ('a.jsonl', lines({'text': 5}), r'a\.jsonl:1 must have the string "text"'),
        ('a.jsonl', lines(['text']), r'a\.jsonl:1 must have the string "text"'),
        ('a.jsonl', lines({'prompt': 'x'}), r'a\.jsonl:1 must have the string "text"'),
        ('a.jsonl', b'{"text": "\\ud800"}', r'a\.jsonl:1 has half a surrogate'),
        ('a.jsonl', b'{"text":' + b'[' * 5000 + b']' * 5000 + b'}', r'a\.jsonl:1 is not a JSON'),
        ('a.jsonl', b'{"a":' * 99_999, r'a\.jsonl:1 is not a JSON'),
        ('a.jsonl', b'{"n": ' + b'7' * 5000 + b'}', r'a\.jsonl:1 is not a JSON'),
        ('a.JSONL', b'{"text":', r'a\.JSONL:1 is not a JSON'),
        ('a.jsonl.GZ', gzip.compress(b'{"text":', mtime=0), r'a\.jsonl\.GZ:1 is not a JSON'),
        ('a.TXT.GZ', b'plain', r'a\.TXT\.GZ is not a whole gzip'),
    ],
)
def test_what_is_not_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(corpora.read(str(tmp_path / 'a.*')))


def test_a_gzip_file_with_any_flipped_bit_is_named_or_reads_the_same(tmp_path):
    text = ' '.join(map(str, range(300))).encode()
    whole, damaged = gzip.compress(text, mtime=0), 0
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        (tmp_path / 'a.txt.gz').write_bytes(flipped)
        try:
            assert [d.text.encode() for d in corpora.read(str(tmp_path / 'a.txt.gz'))] == [text]
        except UserError as error:
            damaged += 1
            assert 'a.txt.gz is not a whole gzip file' in str(error)
    assert damaged > 0.9 * len(whole)


@pytest.mark.parametrize('kind', ['pipe', 'socket', 'device', 'dangling link', 'looping link'])
@pytest.mark.parametrize('by_glob', [False, True])
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, monkeypatch, kind, by_glob):
    monkeypatch.chdir(tmp_path)
    path, target = tmp_path / 'odd.jsonl', {'device': '/dev/zero', 'dangling link': 'nothing'}
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind('odd.jsonl')
    else:
        path.symlink_to(target.get(kind, 'odd.jsonl'))
    reason = 'is a link to nothing' if 'link' in kind else 'is a pipe, a device or a socket'
    for use in (corpora.state, lambda corpus: next(corpora.read(corpus))):
        with pytest.raises(UserError, match=rf'odd\.jsonl {reason}.*data\.corpus'):
            use('odd*' if by_glob else 'odd.jsonl')


@pytest.mark.parametrize(
    ('corpus', 'message'),
    [
        ('gs://bucket/*.txt', r"needs the package gcsfs: pip install 'helios_jax\[gcs\]'"),
        ('tfds:gs://bucket/x', r"needs the package gcsfs: pip install 'helios_jax\[gcs\]'"),
        ('s3://bucket/*.txt', r's3:// is not supported; name a local path or gs://'),
        ('https://host/a.txt', r'https:// is not supported; name a local path or gs://'),
        ('tfds:foo://x', r'foo:// is not supported; name a local path or gs://'),
        ('tfds:', 'names no data set; write tfds:NAME'),
        ('tfds:../x', 'cannot be opened as a TFDS data set'),
        ('tfds:a b', 'cannot be opened as a TFDS data set'),
        ('***', 'cannot be listed'),
        ('a\0b', 'matches no file'),
    ],
)
def test_names_that_nothing_can_open(monkeypatch, corpus, message):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    for use in (corpora.state, lambda corpus: next(corpora.read(corpus))):
        with pytest.raises(UserError, match=message) as refused:
            use(corpus)
        assert '\n' not in str(refused.value)


@pytest.mark.parametrize('content', ['{', '[' * 5000, '{}', '[1]'])
def test_a_damaged_tfds_description_is_named(fables, content):
    (fables / 'dataset_info.json').write_text(content)
    with pytest.raises(UserError, match=r'fables.*cannot be opened as a TFDS data set') as refused:
        corpora.state(f'tfds:{fables}')
    assert '\n' not in str(refused.value)


def test_damaged_tfds_records_are_named(fables):
    (shard,) = fables.glob('*train*')
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r'train.*is damaged \(cut short\); prepare that data set'):
        list(corpora.read(f'tfds:{fables}'))


def test_state_of_a_tfds_data_set_tells_of_its_records(fables):
    before = corpora.state(f'tfds:{fables}')
    (shard,) = fables.glob('*train*')
    shard.write_bytes(shard.read_bytes())
    assert corpora.state(f'tfds:{fables}') != before


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match='matches no file'):
        list(corpora.read(str(tmp_path / '*.txt')))
    with pytest.raises(UserError, match='is a directory; name its files'):
        list(corpora.read(str(tmp_path)))
    with pytest.raises(UserError, match="Did you mean 'python_stdlib'"):
        list(corpora.read('python_stlib'))


class Fables(tfds.core.GeneratorBasedBuilder):
    """A data set of somebody else's, with a train and a test split."""

    VERSION = tfds.core.Version('2.3.4')
    TEXT = 'story'

    def _info(self):
        features = {self.TEXT: tfds.features.Text(), 'number': tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name, 7) for name in ('train', 'test')}

    def _generate_examples(self, split, count):
        for number in range(count):
            yield number, {self.TEXT: f'{split} ß {number}', 'number': number}


@pytest.fixture
def fables(tmp_path) -> epath.Path:
    builder = Fables(data_dir=tmp_path, file_format='array_record')
    builder.download_and_prepare()
    return epath.Path(builder.data_dir)


@pytest.mark.parametrize('by_name', [True, False])
def test_tfds(fables, by_name):
    if by_name:
        tfds.core.add_data_dir(fables.parent.parent)
    corpus = 'tfds:fables' if by_name else f'tfds:{fables}'
    documents = list(corpora.read(corpus))
    assert sorted(documents) == [Document('', f'train ß {number}') for number in range(7)]


def test_tfds_stored_as_tfrecord_is_not_called_missing(fables):
    info = fables / 'dataset_info.json'
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match='stored as tfrecord'):
        list(corpora.read(f'tfds:{fables}'))
    with pytest.raises(UserError, match='no prepared data set of this name'):
        list(corpora.read('tfds:no_such_fables'))


def test_tfds_without_text_or_train(fables):
    features, info = fables / 'features.json', fables / 'dataset_info.json'
    features.write_text(features.read_text().replace('text_feature.Text', 'scalar.Scalar'))
    stored = features.read_text()
    features.write_text(stored.replace('"text": {}', '"tensor": {"dtype": "string"}'))
    with pytest.raises(UserError, match=r"no text feature called 'text'.*number"):
        list(corpora.read(f'tfds:{fables}'))
    info.write_text(info.read_text().replace('"train"', '"training"'))
    with pytest.raises(UserError, match=r"no split 'train', only.*training"):
        list(corpora.read(f'tfds:{fables}'))
