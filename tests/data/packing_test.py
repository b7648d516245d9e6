import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.data import documents, packing, records, tokenizer
from helios_jax.data.bpe import train_bpe
from helios_jax.data.corpora import Document
from helios_jax.errors import UserError

BYTES = tokenizer.load('bytes')
PAIRS = st.tuples(st.just('') | st.text(max_size=30), st.text(max_size=90))
TEXTS = st.lists(PAIRS.map(lambda pair: Document(*pair)), min_size=1)


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_best_fit_fills_bins_without_overflow(case):
    capacity, lengths = case
    bins = packing.best_fit(lengths, capacity)
    assert sorted(index for row in bins for index in row) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in row) for row in bins]
    assert all(load <= capacity for load in loads)
    # Two bins that fit into one would have been one.
    smallest = sorted(loads)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity


def test_best_fit_prefers_the_fullest_bin_that_has_room():
    assert packing.best_fit([6, 8, 2, 4], 10) == [[0, 3], [1, 2]]
    assert packing.best_fit([5, 7, 3], 10) == [[0], [1, 2]]


@pytest.mark.parametrize('row_length', [4, 17, 256])
@given(docs=TEXTS)
@settings(max_examples=40)
def test_best_fit_rows_hold_every_document(row_length, docs):
    rows = packing.Packer(BYTES, row_length, 'best_fit').rows(docs)
    pieces = [piece for row in rows for piece in row]
    for row in rows:
        assert sum(len(piece.tokens) for piece in row) <= row_length
    for piece in pieces:
        assert piece.tokens[0] == BYTES.bos_id
        assert BYTES.bos_id not in piece.tokens[1:]
    # Every piece but a document's last is as long as the row; lasts end with EOS.
    lasts = [p for p in pieces if p.tokens[-1] == BYTES.eos_id]
    assert len(lasts) == len(docs)
    assert all(len(p.tokens) == row_length for p in pieces if p.tokens[-1] != BYTES.eos_id)
    kept = sorted(token for piece in pieces for token in piece.tokens[1:].tolist())
    given_tokens = [[*(d.prompt + d.text).encode(), BYTES.eos_id] for d in docs]
    assert kept == sorted(token for tokens in given_tokens for token in tokens)
    assert sum(int(p.num_bytes.sum()) for p in pieces) == sum(len(d.text.encode()) for d in docs)
    assert sum(int((~p.is_target).sum()) for p in pieces) == sum(
        len(d.prompt.encode()) for d in docs
    )


@pytest.mark.parametrize('row_length', [4, 17, 256])
@given(docs=TEXTS)
@settings(max_examples=40)
def test_concatenated_rows_are_one_stream(row_length, docs):
    rows = packing.Packer(BYTES, row_length, 'concatenate').rows(docs)
    assert all(len(row) == 1 and row[0].tokens[0] == BYTES.bos_id for row in rows)
    assert all(len(row[0].tokens) == row_length for row in rows[:-1])
    stream = b''.join((d.prompt + d.text).encode() + bytes([BYTES.eos_id]) for d in docs)
    assert bytes(token for row in rows for token in row[0].tokens[1:].tolist()) == stream
    assert sum(int(row[0].num_bytes.sum()) for row in rows) == sum(
        len(d.text.encode()) for d in docs
    )


@pytest.mark.parametrize('row', range(6))
def test_a_piece_has_the_bytes_of_its_own_tokens(row):
    (piece,) = packing.Packer(BYTES, 5, 'best_fit').rows([Document('pro', 'eleven byte' * 2)])[row]
    text = bytes(t for t in piece.tokens.tolist() if t < 0xF8)
    in_prompt = int((~piece.is_target).sum())
    assert piece.num_bytes.sum() == len(text) - in_prompt
    assert in_prompt == (3 if row == 0 else 0)


def packed(corpus: str, cache_dir: epath.Path, **options) -> epath.Path:
    row_length, kind = options.get('row_length', 64), options.get('packing', 'best_fit')
    splits = documents.prepare(corpus, cache_dir, options.get('validation_fraction', 0.1))
    packer = packing.Packer(options.get('tokenizer', BYTES), row_length, kind)
    return packing.pack(
        splits['train'], packer, cache_dir, options.get('num_workers', 1),
        options.get('rebuild', False),
    )  # fmt: skip


def stored_rows(directory: epath.Path) -> list[dict]:
    source = records.Records(tfds.builder_from_directory(directory).info, packing.SPLIT)
    return [source[index] for index in range(len(source))]


def assert_same_rows(first: epath.Path, second: epath.Path) -> None:
    one, two = stored_rows(first), stored_rows(second)
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('kind', ['best_fit', 'concatenate'])
def test_cache_is_a_tfds_data_set_that_adds_up(corpus, cache_dir, kind):
    directory = packed(corpus, cache_dir, packing=kind)
    builder = tfds.builder_from_directory(directory)
    rows = list(builder.as_data_source(packing.SPLIT))
    metadata = builder.info.metadata
    assert metadata['num_tokens'] == sum(len(row['tokens']) for row in rows)
    assert metadata['num_bytes'] == sum(row['num_bytes'] for row in rows)
    splits = documents.prepare(corpus, cache_dir, 0.1)
    assert metadata['num_bytes'] == splits['train'].num_bytes
    for row in rows:
        assert row['segment_lengths'].sum() == len(row['tokens']) <= 64
        assert row['tokens'].dtype == np.uint8 and 'loss_mask' not in row
    assert_same_rows(directory, directory)
    assert not [path for path in directory.iterdir() if path.suffix in ('.part', '.stats')]


def test_cached_rows_are_found_again(corpus, cache_dir, monkeypatch):
    directory = packed(corpus, cache_dir)
    monkeypatch.setattr(packing, '_run', None)
    assert packed(corpus, cache_dir) == directory


def test_fingerprint_names_all_that_matters(corpus, cache_dir, tmp_path):
    train_bpe(['some text'] * 9, 263, epath.Path(tmp_path) / 'bpe.json')
    bpe = tokenizer.load(str(tmp_path / 'bpe.json'))
    variants = [{}, {'row_length': 65}, {'packing': 'concatenate'}, {'tokenizer': bpe}]
    names = {packed(corpus, cache_dir, **variant).name for variant in variants}
    names.add(packed(corpus, cache_dir, validation_fraction=0.5).name)
    splits = documents.prepare(corpus, cache_dir, 0.1)
    packer = packing.Packer(BYTES, 64, 'best_fit')
    names.add(packing.pack(splits['validation'], packer, cache_dir, 1).name)
    assert len(names) == 6


@pytest.mark.slow
def test_number_of_workers_changes_nothing(corpus, cache_dir):
    one = packed(corpus, cache_dir, num_workers=1)
    three = packed(corpus, cache_dir / 'other', num_workers=3)
    assert one.name == three.name
    assert tfds.builder_from_directory(three).info.splits[packing.SPLIT].num_shards >= 6
    assert_same_rows(one, three)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_interrupted_run_is_taken_up(corpus, cache_dir, monkeypatch):
    whole = packed(corpus, cache_dir)
    done = []
    original = packing._ShardJob.__call__

    def fail_at_third(self, index):
        if index == 2:
            raise KeyboardInterrupt
        done.append(index)
        return original(self, index)

    other = cache_dir / 'other'
    with monkeypatch.context() as context:
        context.setattr(packing._ShardJob, '__call__', fail_at_third)
        with pytest.raises(KeyboardInterrupt):
            packed(corpus, other)
    assert done == [0, 1]
    directory = other / 'rows' / whole.name
    damaged = directory / f'{records.shard_name(packing.NAME, packing.SPLIT, 1)}.stats.json'
    damaged.write_text(damaged.read_text().replace('"num_tokens": ', '"num_tokens": 1'))
    assert not (directory / 'dataset_info.json').exists()
    first = directory / records.shard_name(packing.NAME, packing.SPLIT, 0)
    before = os.stat(first).st_mtime_ns
    assert packed(corpus, other) == directory
    assert os.stat(first).st_mtime_ns == before
    assert_same_rows(whole, directory)


@pytest.mark.parametrize(
    'content', [b'', b'3', b'null', b'[3, 4]', b'{"a": 1, "b": 2}', b'\xff', b'[' * 100_000]
)
def test_a_shards_numbers_that_are_none_are_made_again(tmp_path, content):
    shard, stats = epath.Path(tmp_path) / 'shard', epath.Path(tmp_path) / 'shard.stats.json'
    shard.touch()
    stats.write_bytes(content)
    assert packing._finished(shard, stats) == {}
    stats.write_text(json.dumps([{'rows': 7}, records.digest({'rows': 7})]))
    assert packing._finished(shard, stats) == {'rows': 7}


def test_a_killed_run_is_taken_up(corpus, cache_dir, monkeypatch):
    """SIGKILL while a shard is half written: what has its name is whole, the rest is redone."""
    script = """
        import os, signal, sys
        from etils import epath
        from helios_jax.data import documents, packing, records, tokenizer
        documents.SHARD_BYTES = 4_000
        write, count = records._serialize, 0
        def die(example):
            global count
            count += 'tokens' in example
            if count == 200:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(example)
        records._serialize = die
        cache = epath.Path(sys.argv[2])
        train = documents.prepare(sys.argv[1], cache, 0.1)['train']
        packer = packing.Packer(tokenizer.load('bytes'), 64, 'best_fit')
        packing.pack(train, packer, cache, 1)
    """
    whole = packed(corpus, cache_dir)
    other = cache_dir / 'other'
    command = [sys.executable, '-c', textwrap.dedent(script), corpus, str(other)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    directory = other / 'rows' / whole.name
    names = [path.name for path in directory.iterdir()]
    assert any(name.endswith('.part') for name in names)
    assert records.shard_name(packing.NAME, packing.SPLIT, 0) in names
    assert 'dataset_info.json' not in names
    monkeypatch.setattr(packing, 'STALE_SECONDS', -1.0)
    assert_same_rows(whole, packed(corpus, other))
    assert not [p for p in directory.iterdir() if p.name.endswith('.part')]


def test_prompts_are_stored_as_a_mask(tmp_path, cache_dir):
    records_ = [{'prompt': f'q{i} ' * 9, 'completion': f'a{i}é'} for i in range(40)]
    path = tmp_path / 'a.jsonl'
    path.write_text('\n'.join(map(json.dumps, [*records_, {'text': 'plain'}])))
    rows = stored_rows(packed(str(path), cache_dir, validation_fraction=1e-3 + 0.2))
    for row in rows:
        assert len(row['loss_mask']) == len(row['tokens'])
        text = row['tokens'][row['loss_mask'].astype(bool)]
        assert row['num_bytes'] == (text < 0xF8).sum()
        assert b'q' not in text.tobytes()
    assert any((row['loss_mask'] == 0).any() for row in rows)


def vowels(tmp_path) -> tokenizer.Tokenizer:
    """Drops every other character without a word."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate('aeiou')}, []))
    made.add_special_tokens(['<|bos|>', '<|eos|>'])
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(tmp_path / 'vowels.json'))
    return tokenizer.load(str(tmp_path / 'vowels.json'))


def test_lost_bytes_are_counted_and_shown(corpus, cache_dir, tmp_path):
    directory = packed(corpus, cache_dir, tokenizer=vowels(tmp_path))
    metadata = tfds.builder_from_directory(directory).info.metadata
    splits = documents.prepare(corpus, cache_dir, 0.1)
    assert metadata['num_lost_bytes'] == splits['train'].num_bytes - metadata['num_bytes'] > 0
    assert metadata['num_bytes'] == sum(row['num_bytes'] for row in stored_rows(directory))
    texts = ''.join(document.text for shard in splits['train'].shards() for document in shard)
    assert metadata['num_bytes'] == sum(texts.count(vowel) for vowel in 'aeiou')
    assert " comes back as '" in metadata['lost_example']
    whole = tfds.builder_from_directory(packed(corpus, cache_dir)).info.metadata
    assert (whole['num_lost_bytes'], whole['lost_example']) == (0, '')


@pytest.mark.slow
def test_an_older_versions_rows_are_packed_again_to_the_same_bits(corpus, cache_dir):
    directory = packed(corpus, cache_dir)
    before = stored_rows(directory)
    (directory / 'manifest.json').unlink()  # which they lacked
    assert packed(corpus, cache_dir) == directory
    assert (directory / 'manifest.json').exists()
    for one, two in zip(before, stored_rows(directory), strict=True):
        assert all(np.array_equal(one[key], two[key]) for key in one)


def test_damaged_rows_are_named_and_rebuilding_mends_them(corpus, cache_dir):
    directory = packed(corpus, cache_dir)
    before, shard = stored_rows(directory), sorted(directory.glob('*array_record*'))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf'{shard} is damaged .*--rebuild'):
        packed(corpus, cache_dir)
    assert packed(corpus, cache_dir, rebuild=True) == directory
    assert packed(corpus, cache_dir) == directory
    for one, two in zip(before, stored_rows(directory), strict=True):
        assert all(np.array_equal(one[key], two[key]) for key in one)


def die(index: int) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.slow
def test_a_killed_worker_is_told():
    with pytest.raises(UserError, match=r'of the 2 processes .* was killed.*data\.num_workers'):
        list(packing._map(die, 4, 2))


def test_workers_start_without_jax():
    code = 'import sys, helios_jax.data.packing; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.slow
def test_workers_do_not_run_the_callers_script(corpus, cache_dir, tmp_path):
    """A script without `if __name__ == '__main__'` may call us."""
    script = tmp_path / 'unguarded.py'
    script.write_text(
        textwrap.dedent("""
        import sys
        from etils import epath
        from helios_jax.data import documents, packing, tokenizer
        print('started')
        documents.SHARD_BYTES = 4_000
        cache = epath.Path(sys.argv[2])
        train = documents.prepare(sys.argv[1], cache, 0.1)['train']
        packing.pack(train, packing.Packer(tokenizer.load('bytes'), 64, 'best_fit'), cache, 2)
        """)
    )
    environment = os.environ | {'PYTHONPATH': os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(script), corpus, str(cache_dir)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('started') == 1
