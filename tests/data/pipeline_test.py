import collections
import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
import tokenizers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from helios_jax import config
from helios_jax.data import baselines, corpora, documents, pipeline, tokenizer
from helios_jax.data.bpe import train_bpe
from helios_jax.data.rows import Mixture, Rows, changes
from helios_jax.errors import UserError

BYTES = tokenizer.load('bytes')
ROW_LENGTH = 67


@pytest.fixture(scope='module')
def directory(tmp_path_factory) -> epath.Path:
    return epath.Path(tmp_path_factory.mktemp('pipeline'))


@pytest.fixture(scope='module')
def globs(directory, write_corpus) -> list[str]:
    return [write_corpus(directory / name, count, count) for name, count in (('a', 53), ('b', 17))]


def settings(directory: epath.Path, corpus: str, **options) -> config.Data:
    options = {'row_length': ROW_LENGTH, 'validation_fraction': 0.2} | options
    return config.Data(corpus=corpus, cache_dir=str(directory / 'cache'), **options)


@pytest.fixture(scope='module')
def single(directory, globs) -> pipeline.Prepared:
    return pipeline.prepare(settings(directory, globs[0]), BYTES)


@pytest.fixture(scope='module')
def mixed(directory, globs) -> pipeline.Prepared:
    mixture = f'{globs[0]}=0.7,{globs[1]}=0.3'
    return pipeline.prepare(settings(directory, mixture), BYTES)


def take(batches, count: int) -> list[pipeline.Batch]:
    return list(itertools.islice(batches, count))


def assert_same(first: list[pipeline.Batch], second: list[pipeline.Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def joined(batches: list[pipeline.Batch]) -> pipeline.Batch:
    return pipeline.Batch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize('packing', ['best_fit', 'concatenate'])
def test_batches_say_what_the_documents_said(directory, globs, packing):
    prepared = pipeline.prepare(settings(directory, globs[0], packing=packing), BYTES)
    pieces = []
    for source in (prepared.train, prepared.validation):
        batch = joined(list(pipeline.eval_batches(source, batch_rows=7)))
        real = batch.segment_ids > 0
        assert real.sum() == source.num_tokens
        assert batch.num_bytes.sum() == source.num_bytes
        assert not batch.tokens[~real].any()
        assert np.array_equal(batch.positions[~real], np.nonzero(~real)[1])
        assert np.array_equal(batch.loss_mask, real)
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                here = batch.segment_ids[row] == segment
                assert np.array_equal(batch.positions[row][here], np.arange(here.sum()))
                assert (np.diff(np.flatnonzero(here)) == 1).all()
                assert batch.tokens[row][here][0] == BYTES.bos_id
                pieces.append(batch.tokens[row][here][1:].astype(np.uint8).tobytes())
    whole = b''.join(text.encode() + bytes([BYTES.eos_id]) for text in corpora.texts(globs[0]))
    assert collections.Counter(b''.join(pieces)) == collections.Counter(whole)
    assert batch.tokens.dtype == batch.positions.dtype == batch.num_bytes.dtype == np.int32


@pytest.mark.parametrize('num_hosts', [1, 2, 4])
def test_hosts_read_slices_of_the_same_batches(mixed, num_hosts):
    options = {'batch_rows': 12, 'seed': 5}
    whole = take(pipeline.train_batches(mixed, **options), 9)
    hosts = [
        take(pipeline.train_batches(mixed, **options, host=host, num_hosts=num_hosts), 9)
        for host in range(num_hosts)
    ]
    assert_same(whole, [joined(list(parts)) for parts in zip(*hosts, strict=True)])


def test_hosts_evaluate_slices_of_the_same_batches(mixed):
    options = {'batch_rows': 6, 'num_rows': 20}
    whole = list(pipeline.eval_batches(mixed.validation, **options))
    hosts = [
        list(pipeline.eval_batches(mixed.validation, **options, host=host, num_hosts=3))
        for host in range(3)
    ]
    assert_same(whole, [joined(list(parts)) for parts in zip(*hosts, strict=True)])


@pytest.mark.parametrize('name', ['single', 'mixed'])
@pytest.mark.parametrize('step', [1, 13, 100])
def test_resuming_equals_going_on(request, name, step):
    prepared = request.getfixturevalue(name)
    straight = take(pipeline.train_batches(prepared, batch_rows=5, seed=7), step + 4)
    resumed = pipeline.train_batches(prepared, batch_rows=5, seed=7, first_sample=5 * step)
    assert_same(straight[step:], take(resumed, 4))


def test_batch_size_may_change_on_the_way(single):
    five = joined(take(pipeline.train_batches(single, batch_rows=5, seed=1, first_sample=30), 6))
    three = joined(take(pipeline.train_batches(single, batch_rows=3, seed=1, first_sample=30), 10))
    assert_same([five], [three])


def test_each_epoch_has_every_row_in_another_order(single):
    (rows,) = single.train.corpora
    orders = [
        [single.train.locate(epoch * len(rows) + i, seed)[1] for i in range(len(rows))]
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert all(sorted(order) == list(range(len(rows))) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 10**12))
def test_mixture_counts_grow_by_one_corpus_at_a_time(shares, num_samples):
    weights = corpora.parse(','.join(f'c{i}={share}' for i, share in enumerate(shares)))
    source = Mixture(corpora=(), weights=tuple(weight for _, weight in weights))
    before, after = source.counts(num_samples), source.counts(num_samples + 1)
    assert sum(before) == num_samples
    steps = [b - a for a, b in zip(before, after, strict=True)]
    assert sorted(steps) == [0] * (len(shares) - 1) + [1]
    for count, (_, weight) in zip(before, weights, strict=True):
        assert abs(count - num_samples * weight) < len(shares)


def test_mixture_gives_each_corpus_its_share(mixed):
    located = [mixed.train.locate(sample, 3) for sample in range(2000)]
    parts = collections.Counter(part for part, _ in located)
    assert parts == {0: 1400, 1: 600}
    for start in range(0, 2000, 10):
        assert sum(part for part, _ in located[start : start + 10]) == 3
    # The smaller corpus goes round more often, and misses no row.
    for part, rows in enumerate(mixed.train.corpora):
        seen = [row for p, row in located if p == part]
        for epoch in range(len(seen) // len(rows)):
            rows_of_epoch = seen[epoch * len(rows) : (epoch + 1) * len(rows)]
            assert sorted(rows_of_epoch) == list(range(len(rows)))


def test_neighbouring_batches_are_not_alike():
    """index_shuffle with too few rounds leaves a trend between batches of a large data set."""

    class Many(Rows):
        def __init__(self):
            self.fingerprint = 'many'

        def __len__(self):
            return 10**6

    source = Mixture((Many(),), (corpora.parse('x')[0][1],))
    located = np.array([source.locate(sample, 0)[1] for sample in range(64 * 512)])
    means = located.reshape(512, 64).mean(1)
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 5 / math.sqrt(512)
    assert abs(means.mean() / 10**6 - 0.5) < 5 / math.sqrt(12 * 64 * 512)


@pytest.mark.parametrize('num_rows', [1, 9, 20, 10**6])
def test_evaluation_takes_the_rows_asked_for(mixed, num_rows):
    batches = list(pipeline.eval_batches(mixed.validation, batch_rows=4, num_rows=num_rows))
    again = list(pipeline.eval_batches(mixed.validation, batch_rows=4, num_rows=num_rows))
    assert_same(batches, again)
    assert {batch.tokens.shape for batch in batches} == {(4, ROW_LENGTH)}
    batch = joined(batches)
    occupied = batch.segment_ids.any(1)
    assert occupied.sum() == min(num_rows, len(mixed.validation))
    assert not batch.tokens[~occupied].any() and not batch.num_bytes[~occupied].any()
    assert not batch.loss_mask[~occupied].any()
    assert len(np.unique(batch.tokens[occupied], axis=0)) == occupied.sum()


def test_prompts_are_no_targets(directory):
    path = directory / 'prompts.jsonl'
    lines = [{'prompt': f'q{i}' * 5, 'completion': f'a{i}' * 40} for i in range(30)]
    path.write_text('\n'.join(map(json.dumps, lines)))
    source = pipeline.from_text(str(path), settings(directory, 'unused'), BYTES)
    batch = joined(list(pipeline.eval_batches(source, batch_rows=3)))
    masked = batch.tokens[(batch.segment_ids > 0) & ~batch.loss_mask]
    assert bytes(sorted(masked.tolist())) == bytes(
        sorted(''.join(line['prompt'] for line in lines).encode())
    )
    assert batch.num_bytes.sum() == sum(len(line['completion']) for line in lines)


def test_text_of_a_glob_is_held_out_nowhere(directory, globs):
    source = pipeline.from_text(globs[1], settings(directory, 'unused'), BYTES)
    assert source.num_bytes == sum(len(text.encode()) for text in corpora.texts(globs[1]))


def test_another_tokenizer_counts_the_same_bytes(directory, globs, single):
    train_bpe(corpora.texts(globs[0]), 300, directory / 'bpe.json')
    bpe = tokenizer.load(str(directory / 'bpe.json'))
    prepared = pipeline.prepare(settings(directory, globs[0]), bpe)
    for one, two in ((single.train, prepared.train), (single.validation, prepared.validation)):
        assert one.num_bytes == two.num_bytes
        assert one.num_tokens > two.num_tokens
        assert one.fingerprint != two.fingerprint
    ours, theirs = (
        baselines.bits_per_byte(p.validation, t) for p, t in ((single, BYTES), (prepared, bpe))
    )
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[key] - theirs[key]) < 0.1 * ours[key] for key in ours)


def lossy_tokenizer(directory: epath.Path) -> tokenizer.Tokenizer:
    """Knows the letters of 'alpha' and the space, and drops the rest."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate('alph ')}, []))
    made.add_special_tokens(['<|bos|>', '<|eos|>'])
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(directory / 'lossy.json'))
    return tokenizer.load(str(directory / 'lossy.json'))


def test_a_tokenizer_that_loses_text_is_refused_with_its_share(directory, globs):
    message = (
        r"data\.tokenizer='lossy\.json' loses \d+\.\d+% of the validation split of .*"
        r'\([\d,]+ of [\d,]+ bytes; .* comes back as .*\), .*data\.allow_lossy_tokenizer=True'
    )
    with pytest.raises(UserError, match=message) as refused:
        pipeline.prepare(settings(directory, globs[1]), lossy_tokenizer(directory))
    assert '\n' not in str(refused.value)


def test_a_tokenizer_that_loses_text_counts_only_what_it_keeps(directory, globs, caplog):
    tok = lossy_tokenizer(directory)
    data = settings(directory, globs[1], allow_lossy_tokenizer=True)
    prepared = pipeline.prepare(data, tok)
    assert 'bits per byte count only what is kept' in caplog.text
    texts = ''.join(corpora.texts(globs[1]))
    kept = sum(texts.count(character) for character in 'alph ')
    sources = (prepared.train, prepared.validation)
    assert sum(source.num_bytes for source in sources) == kept
    lost = len(texts.encode()) - kept
    assert sum(line['lost_bytes'] for line in pipeline.summary(prepared)) == lost
    source = pipeline.from_text(globs[1], data, tok)
    assert source.lost_fraction == lost / len(texts.encode())
    batches = list(pipeline.eval_batches(source, batch_rows=3))
    assert joined(batches).num_bytes.sum() == kept
    # The yardsticks see those bytes and no others.
    shares = np.array([texts.count(character) / kept for character in 'alph '])
    found = baselines.bits_per_byte(source, tok)
    assert found['order0_bits_per_byte'] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found['gzip_bits_per_byte'] < found['order0_bits_per_byte']


def test_nothing_is_lost_by_a_tokenizer_that_keeps_every_byte(single, caplog):
    assert single.train.lost_fraction == single.validation.lost_fraction == 0
    assert not caplog.text


@pytest.mark.parametrize('empty', ['train', 'validation'])
def test_a_split_without_text_to_score_is_refused(directory, empty):
    """Prompts whose completions are empty have nothing to score."""
    path = directory / f'empty_{empty}.jsonl'
    data = settings(directory, str(path))
    lines = []
    for number in range(60):
        document = corpora.Document(f'question {number}', '')
        in_validation = documents._unit_hash(document) < data.validation_fraction
        if in_validation == (empty == 'validation'):
            lines.append({'prompt': document.prompt, 'completion': ''})
    for number in range(60):
        document = corpora.Document('', f'answer {number}')
        in_validation = documents._unit_hash(document) < data.validation_fraction
        if in_validation != (empty == 'validation'):
            lines.append({'text': document.text})
    path.write_text('\n'.join(map(json.dumps, lines)))
    with pytest.raises(
        UserError, match=f'the {empty} split of data.corpus=.* has no text to score'
    ):
        pipeline.prepare(data, BYTES)


@pytest.mark.parametrize('kind', ['emptied', 'cut short', 'missing', 'flipped'])
def test_rows_that_are_damaged_are_named_while_training(directory, globs, kind):
    data = settings(directory / kind, globs[1], row_length=71)
    prepared = pipeline.prepare(data, BYTES)
    (rows,) = prepared.train.corpora
    (shard,) = rows.directory.glob('*array_record*')
    content = bytearray(shard.read_bytes())
    place = content.index(b'alpha')
    if kind == 'missing':
        shard.unlink()
    else:
        content[place] ^= 1
        shard.write_bytes({'emptied': b'', 'cut short': content[:place]}.get(kind, content))
    with pytest.raises(UserError, match=rf'{shard} is damaged .*--rebuild') as named:
        take(pipeline.train_batches(prepared, batch_rows=4, seed=0), 50)
    assert '\n' not in str(named.value)
    if kind != 'flipped':  # found when read
        with pytest.raises(UserError, match=rf'{shard} is damaged .*--rebuild'):
            pipeline.prepare(data, BYTES)
    mended = pipeline.prepare(data, BYTES, rebuild=True)
    assert mended.train.fingerprint == prepared.train.fingerprint
    assert len(take(pipeline.train_batches(mended, batch_rows=4, seed=0), 50)) == 50


def test_a_cache_that_cannot_be_written_is_named(directory, globs):
    (directory / 'file').touch()
    with pytest.raises(UserError, match=r'file.* could not be written: .*data\.cache_dir'):
        pipeline.prepare(settings(directory / 'file', globs[1]), BYTES)
    with pytest.raises(UserError, match=r"data\.cache_dir='s3://b.*is not supported"):
        pipeline.prepare(config.Data(corpus=globs[1], cache_dir='s3://b'), BYTES)


def test_changes_of_the_text_are_told(directory, write_corpus):
    glob = write_corpus(directory / 'changing', 29, 3)
    data = settings(directory, glob, row_length=79)
    first = pipeline.prepare(data, BYTES).contents
    assert json.loads(json.dumps(first)) == first
    for split in ('train', 'validation'):
        assert changes(first[split], first[split]) == ''
    other_rows = dataclasses.replace(data, row_length=83)
    longer = pipeline.prepare(other_rows, BYTES).contents
    assert longer['validation']['rows'] != first['validation']['rows']
    assert changes(first['validation'], longer['validation']) == ''
    removed = sorted(epath.Path(glob).parent.iterdir())[:3]
    lost = sum(path.stat().length for path in removed)
    for path in removed:
        path.unlink()
    fewer = pipeline.prepare(data, BYTES).contents
    told = [changes(first[split], fewer[split]) for split in ('train', 'validation')]
    counts = [first[split]['documents'] - fewer[split]['documents'] for split in first]
    assert sum(counts) == 3
    for split, count, line in zip(first, counts, told, strict=True):
        sizes = (fewer[split]['bytes'], first[split]['bytes'])
        expected = f'{count} documents fewer, {sizes[0]:,} bytes instead of {sizes[1]:,}'
        assert line == (expected if count else '')
    assert sum(first[s]['bytes'] - fewer[s]['bytes'] for s in first) == lost
    assert 'documents more' in changes(fewer['train'], first['train'])
    same = first['train'] | {'text': 'other'}
    assert 'documents as before, not all of them the same' in changes(first['train'], same)


@pytest.mark.parametrize('spec', [PartitionSpec('rows'), PartitionSpec('rows', 'length')])
def test_to_global_shards_rows(directory, globs, spec):
    prepared = pipeline.prepare(settings(directory, globs[0], row_length=66), BYTES)
    batch = next(pipeline.train_batches(prepared, batch_rows=12, seed=0))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('rows', 'length'))
    spread = pipeline.to_global(batch, NamedSharding(mesh, spec))
    assert_same([batch], [spread])
    assert spread.tokens.addressable_shards[0].data.shape == (3, 66 if len(spec) == 1 else 33)
    assert spread.num_bytes.addressable_shards[0].data.shape == (3,)


def test_hosts_must_divide_the_batch(single):
    with pytest.raises(UserError, match=r'batch_rows=10 .* 4 hosts'):
        pipeline.train_batches(single, batch_rows=10, seed=0, host=0, num_hosts=4)
    with pytest.raises(UserError, match=r'batch_rows=10 .* 4 hosts'):
        next(pipeline.eval_batches(single.train, batch_rows=10, host=0, num_hosts=4))


def test_summary_and_fingerprints(directory, globs, single, mixed):
    lines = pipeline.summary(mixed)
    assert [line['split'] for line in lines] == ['train', 'train', 'validation', 'validation']
    assert [line['weight'] for line in lines[:2]] == [0.7, 0.3]
    assert sum(line['rows'] for line in lines[:2]) == len(mixed.train)
    assert all(0.8 < line['fill'] <= 1 for line in lines[:2])
    assert all(epath.Path(line['path']).is_dir() for line in lines)
    again = pipeline.prepare(settings(directory, globs[0], num_workers=3), BYTES)
    assert again.train.fingerprint == single.train.fingerprint != mixed.train.fingerprint
    assert single.train.fingerprint != single.validation.fingerprint


def test_train_tokenizer_writes_a_loadable_file(directory, globs):
    pipeline.train_tokenizer(globs[1], 283, str(directory / 'deep' / 'trained.json'))
    assert tokenizer.load(str(directory / 'deep' / 'trained.json')).vocab_size == 283
    with pytest.raises(UserError, match=r'must end in \.json'):
        pipeline.train_tokenizer(globs[1], 283, str(directory / 'trained'))


@pytest.mark.slow
def test_standard_library(directory):
    data = settings(directory, 'python_stdlib', row_length=2048, validation_fraction=0.02)
    prepared = pipeline.prepare(data, BYTES)
    assert len(prepared.train) > 2_000
    for line in pipeline.summary(prepared):
        assert line['fill'] > 0.97
        assert line['bytes'] < line['tokens'] < 1.01 * line['bytes']
    found = baselines.bits_per_byte(prepared.validation, BYTES)
    assert 1 < found['gzip_bits_per_byte'] < found['order0_bits_per_byte'] < 6
    assert documents.SHARD_BYTES == 2**23
