"""Conversations on their way from records to rows, and what they leave as it was."""

import json
from pathlib import Path

import chats
import pytest

from helios_jax import config
from helios_jax.data import baselines, pipeline, records, tokenizer
from helios_jax.data.rows import changes
from helios_jax.errors import UserError

BYTES = tokenizer.load('bytes')


def settings(directory: Path, corpus: str, **options) -> config.Data:
    options = {'row_length': 64, 'validation_fraction': 0.2, 'num_workers': 1} | options
    return config.Data(corpus=corpus, cache_dir=str(directory / 'cache'), **options)


EARLIER = {  # what versions without conversations gave
    ('text', 'best_fit'): ('94484884c716997f', 'c1c7a0bfbc00ed01', '5ea011168bf47d0f'),
    ('text', 'concatenate'): ('f11364633dc8dab7', 'c1c7a0bfbc00ed01', '68555067c9e035e3'),
    ('pairs', 'best_fit'): ('88415ef456f4104b', '20d32f3536a5d3b7', '45e3293bfbcc75fe'),
    ('pairs', 'concatenate'): ('32eb7e3d16a66f34', '20d32f3536a5d3b7', '3ecf102d617c6d82'),
}


def plain_records(kind: str) -> list[dict]:
    if kind == 'text':
        return [{'text': f'text é {i} ' * (i % 7 + 1)} for i in range(40)]
    return [{'prompt': f'q{i} ' * (i % 5), 'completion': f'answer {i} ü'} for i in range(40)]


def write_records(path, lines: list[dict]) -> str:
    path.write_text('\n'.join(map(json.dumps, lines)))
    return str(path)


@pytest.mark.parametrize(('kind', 'kept'), EARLIER)
def test_text_and_pairs_have_the_fingerprints_and_rows_of_earlier_versions(tmp_path, kind, kept):
    corpus = write_records(tmp_path / 'a.jsonl', plain_records(kind))
    data = settings(tmp_path, corpus, packing=kept)
    (tmp_path / 'my.jinja').write_text('a template changes nothing of these')
    tok = tokenizer.load('bytes', chat_setting=str(tmp_path / 'my.jinja'))
    prepared = pipeline.prepare(data, tok)
    stored = [
        [{k: v.tolist() if hasattr(v, 'tolist') else v for k, v in row.items()} for row in rows]
        for split in (prepared.train, prepared.validation)
        for rows in split.corpora
    ]
    contents = prepared.contents['train']
    found = contents['rows'], contents['text'], records.digest(stored)
    assert found == EARLIER[kind, kept]
    assert contents.keys() == {'rows', 'text', 'documents', 'bytes'}


CHATS = [
    {'messages': [
        {'role': 'user', 'content': f'QUESTION {i} ' * (i % 4 + 1)},
        {'role': 'assistant', 'content': f'answer {i} é'},
        {'role': 'user', 'content': 'MORE'},
        {'role': 'assistant', 'content': f'yes {i} ' * (i % 9 + 1)},
    ]}
    for i in range(50)
]  # fmt: skip


@pytest.mark.parametrize('kind', ['best_fit', 'concatenate'])
def test_answers_are_learnt_across_rows_and_beside_other_records(tmp_path, kind):
    lines = [*CHATS, *plain_records('text'), *plain_records('pairs')]
    data = settings(
        tmp_path, write_records(tmp_path / 'a.jsonl', lines), row_length=23, packing=kind,
    )  # fmt: skip
    prepared = pipeline.prepare(data, BYTES)
    answers = [m['content'] for c in CHATS for m in c['messages'] if m['role'] == 'assistant']
    others = [r.get('text', r.get('completion')) for r in lines[len(CHATS) :]]
    total = prepared.train.num_bytes + prepared.validation.num_bytes
    assert total == len(''.join([*answers, *others]).encode())
    assert prepared.train.lost_fraction == prepared.validation.lost_fraction == 0
    learnt = b''
    for split in (prepared.train, prepared.validation):
        for batch in pipeline.eval_batches(split, batch_rows=7):
            learnt += bytes(t for t in batch.tokens[batch.loss_mask].tolist() if t < 0xFE)
    assert len(learnt) == total
    assert not any(word in learnt for word in (b'QUEST', b'MORE', b'<|', b'q1'))


def test_a_conversation_has_its_split_whatever_the_template(tmp_path):
    corpus = write_records(tmp_path / 'a.jsonl', CHATS)
    (tmp_path / 'my.jinja').write_text(chats.CHATML)
    data = settings(tmp_path, corpus)
    one, two = (
        pipeline.prepare(data, tokenizer.load('bytes', chat_setting=setting))
        for setting in ('', str(tmp_path / 'my.jinja'))
    )
    for split in ('train', 'validation'):
        before, now = one.contents[split], two.contents[split]
        assert before['rows'] != now['rows'] and before['text'] == now['text']
        assert changes(before, before) == ''
        assert 'another chat template' in changes(before, now)
    documents_of = [
        [d for s in p.train.corpora[0].documents.shards() for d in s] for p in (one, two)
    ]
    assert documents_of[0] == documents_of[1]
    assert pipeline.prepare(data, tokenizer.load('bytes')).contents == one.contents


def test_a_mixture_of_text_and_conversations_knows_its_template(tmp_path):
    texts = write_records(tmp_path / 'a.jsonl', plain_records('text'))
    talks = write_records(tmp_path / 'b.jsonl', CHATS)
    data = settings(tmp_path, f'{texts}=0.5,{talks}=0.5')
    mixture = pipeline.prepare(data, BYTES).train
    assert [part.chat_template for part in mixture.corpora] == ['', mixture.chat_template]
    assert mixture.contents['chat_template'] == BYTES.chat_template.fingerprint
    found = baselines.bits_per_byte(mixture, BYTES)
    scored = sum(part.num_bytes for part in mixture.corpora)
    assert found['order0_bits_per_byte'] > 0 and scored == mixture.num_bytes


def test_a_template_that_raises_names_the_record(tmp_path):
    corpus = write_records(tmp_path / 'a.jsonl', CHATS)
    (tmp_path / 'my.jinja').write_text('{{ 1 // messages[4:]|length }}')
    tok = tokenizer.load('bytes', chat_setting=str(tmp_path / 'my.jinja'))
    data = settings(tmp_path, corpus)
    with pytest.raises(UserError, match=r'a\.jsonl:\d+ cannot be rendered by .*my\.jinja: .*zero'):
        pipeline.prepare(data, tok)


def test_a_named_template_that_is_not_jinja_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / 'my.jinja').write_text('\n{% for %}')
    with pytest.raises(UserError, match=r'my\.jinja:2 is not a chat template'):
        tokenizer.load('bytes', chat_setting=str(tmp_path / 'my.jinja'))
