"""Tokenizers of every kind, and what each gives back of a text."""

import io

import pytest
import sentencepiece
import tokenizers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from helios_jax.data import lossy, tokenizer

SAMPLE = 'def f(x):\n    return "hé €uro" + x  # ' + 'the quick brown fox ' * 7
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
BYTE_FALLBACK = [f'<0x{byte:02X}>' for byte in range(256)]


def finished(made: tokenizers.Tokenizer, decoder=None, normalizer=None, pre_tokenizer=None) -> str:
    made.add_special_tokens(['<s>', '</s>'])
    if decoder:
        made.decoder = decoder
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    return made.to_str()


def characters(alphabet: str) -> tokenizers.Tokenizer:
    """One token a character; others are dropped without a word."""
    return tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))


def byte_level(normalizer=None, *, add_prefix_space: bool = False) -> str:
    alphabet = ''.join(sorted(pre_tokenizers.ByteLevel.alphabet()))
    return finished(
        characters(alphabet), decoders.ByteLevel(), normalizer,
        pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
    )  # fmt: skip


def words() -> str:
    vocabulary = {word: i for i, word in enumerate(['[UNK]', 'the', 'quick', 'unk'])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, '[UNK]'))
    return finished(made, pre_tokenizer=pre_tokenizers.Whitespace())


def metaspace_letters(normalizer, *, strip: bool) -> str:
    """Llama's (with a space before the text) and Gemma's kind; every byte has a token."""
    vocabulary = {token: i for i, token in enumerate(['<unk>', *BYTE_FALLBACK, '▁', *LETTERS])}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], byte_fallback=True, unk_token='<unk>', fuse_unk=True)
    )
    steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(' ', 1, 0)] * strip
    return finished(made, decoders.Sequence(steps), normalizer)


def sentences(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE.split('\n') * 2), model_writer=model, vocab_size=400,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


REPLACE = normalizers.Replace(' ', '▁')
PREPEND = normalizers.Sequence([normalizers.Prepend('▁'), REPLACE])
EXACT = {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False}
LOSSLESS = {
    'byte level.json': lambda: byte_level(),
    'byte level behind a space.json': lambda: byte_level(add_prefix_space=True),
    'llama.json': lambda: metaspace_letters(PREPEND, strip=True),
    'gemma.json': lambda: metaspace_letters(REPLACE, strip=False),
    'decoder that strips.json': lambda: metaspace_letters(REPLACE, strip=True),
    'exact.model': lambda: sentences(byte_fallback=True, **EXACT),
    'without a space before.model': lambda: sentences(
        byte_fallback=True, add_dummy_prefix=False, **EXACT
    ),
    'space behind.model': lambda: sentences(
        byte_fallback=True, treat_whitespace_as_suffix=True, **EXACT
    ),
}
LOSSY = {
    'vowels.json': lambda: finished(characters('aeiou')),
    'words.json': words,
    'lower.json': lambda: byte_level(normalizers.Lowercase()),
    'default.model': sentences,
    'no fallback.model': lambda: sentences(**EXACT),
}
TEXTS = [
    'the quick brown fox', ' a', '  a', 'a ', ' ', '\n', '\tx\n\n y', 'é', 'e\u0301', 'x🙃y', '🙃',
    'Quick THE', '<s>a</s><unk>[UNK]', 'ﬁ Ⅷ', '▁a ▁', SAMPLE,
]  # fmt: skip


@pytest.fixture(scope='module')
def load(tmp_path_factory):
    directory, loaded = epath.Path(tmp_path_factory.mktemp('kinds')), {}

    def load(name: str) -> tokenizer.Tokenizer:
        if name not in loaded:
            content = (LOSSLESS | LOSSY)[name]()
            content = content.encode() if isinstance(content, str) else content
            (directory / name).write_bytes(content)
            loaded[name] = tokenizer.load(str(directory / name))
        return loaded[name]

    return load


@pytest.mark.parametrize('name', LOSSLESS)
@given(text=st.text(max_size=40) | st.sampled_from(TEXTS))
def test_a_tokenizer_that_keeps_every_byte_loses_nothing(load, name, text):
    if '▁' in text:
        return  # their name of a space
    (encoded,) = load(name).encode_with_bytes([text])
    assert encoded.kept == text
    assert encoded.num_bytes.sum() == len(text.encode())


@pytest.mark.parametrize('name', [*LOSSLESS, *LOSSY])
@given(text=st.text(max_size=40) | st.sampled_from(TEXTS))
def test_what_is_kept_is_part_of_the_text_and_of_what_comes_back(load, name, text):
    tok = load(name)
    (encoded,) = tok.encode_with_bytes([text])
    assert encoded.ids.tolist() == tok.encode(text)
    assert encoded.num_bytes.sum() == len(encoded.kept.encode())
    remaining = iter(text)
    assert all(character in remaining for character in encoded.kept)
    if encoded.kept != text:
        assert tok.decode(encoded.ids.tolist()) != text


@pytest.mark.parametrize(
    ('name', 'text', 'kept'),
    [
        ('vowels.json', 'hello world', 'eo o'),  # decoding puts spaces between tokens
        ('vowels.json', 'xyz', ''),
        ('words.json', 'the quick', 'the quick'),
        ('words.json', 'the slow quick', 'the quick'),
        ('words.json', 'n k U', ''),  # letters of [UNK] come back, but not for them
        ('words.json', 'the  quick', 'the quick'),
        ('lower.json', 'The Émile €X🙃', 'he mile €🙃'),
        ('default.model', ' the\n\tquick ', 'thequick'),
        ('default.model', 'the🙃x', 'thex'),
        ('no fallback.model', 'the\nquick', 'thequick'),
        ('no fallback.model', ' the  quick ', ' the  quick '),
        ('byte level.json', 'The\n🙃', 'The\n🙃'),
    ],
)
def test_only_what_comes_back_is_kept(load, name, text, kept):
    (encoded,) = load(name).encode_with_bytes([text])
    assert encoded.kept == kept
    assert encoded.num_bytes.sum() == len(kept.encode())


def test_bytes_go_to_the_token_that_gives_them_back(load):
    (encoded,) = load('vowels.json').encode_with_bytes(['xxexxxox'])
    assert encoded.num_bytes.tolist() == [1, 1]
    (encoded,) = load('lower.json').encode_with_bytes(['AéB c'])
    assert encoded.num_bytes.tolist() == [0, 0, 2, 0, 1, 1]


def test_a_space_that_is_stripped_counts_only_where_tokens_tell_of_it(load):
    """These two decode alike, but only one of them has other tokens for 'a' than for ' a'."""
    (told,) = load('decoder that strips.json').encode_with_bytes([' a'])
    (dropped,) = load('default.model').encode_with_bytes([' the'])
    assert (told.kept, dropped.kept) == (' a', 'the')


def test_a_long_run_that_comes_back_otherwise_counts_as_lost(load, monkeypatch):
    monkeypatch.setattr(lossy, 'LONGEST_COMPARED', 3)
    assert lossy._common('abcd', 'abce') == ''
    assert lossy._common('abcd', 'abc') == 'abc'
    assert lossy._common('abcd', 'abcd') == 'abcd'
