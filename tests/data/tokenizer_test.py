import io
import json

import pytest
import sentencepiece
import tokenizers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from helios_jax.data import corpora, tokenizer
from helios_jax.data.bpe import train_bpe
from helios_jax.errors import UserError

SAMPLE = 'def f(x):\n    return "hé €uro 😀" + x  # ' + 'the quick brown fox ' * 7


def whitespace_json(specials: list[str]) -> str:
    """A word-level tokenizer that lower-cases, drops spaces and strips accents."""
    words = ['[UNK]', *specials, 'the', 'quick', 'brown', 'fox', 'he']
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, '[UNK]')
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(specials)
    return made.to_str()


@pytest.fixture(scope='module')
def loaded(tmp_path_factory) -> dict[str, tokenizer.Tokenizer]:
    directory = epath.Path(tmp_path_factory.mktemp('tokenizers'))
    train_bpe([SAMPLE] * 3, 277, directory / 'bpe.json')
    (directory / 'words.json').write_text(whitespace_json(['<s>', '</s>']))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE.split('\n')), model_writer=model, vocab_size=400,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (directory / 'sentences.model').write_bytes(model.getvalue())
    names = ('bytes', 'bpe.json', 'words.json', 'sentences.model')
    return {
        name: tokenizer.load(name if name == 'bytes' else str(directory / name)) for name in names
    }


@pytest.mark.parametrize('name', ['bytes', 'bpe.json', 'words.json', 'sentences.model'])
@given(text=st.text() | st.sampled_from([SAMPLE, '<s></s><|bos|><|eos|>', ' \n ', 'é', 'e\u0301']))
def test_bytes_of_tokens_sum_to_the_text_that_is_kept(loaded, name, text):
    tok = loaded[name]
    (ids, num_bytes, kept), (again, _, _) = tok.encode_with_bytes([text, text])
    assert ids.tolist() == again.tolist() == tok.encode(text) == tok.encode_batch([text])[0]
    assert len(ids) == len(num_bytes)
    assert num_bytes.sum() == len(kept.encode())
    assert kept == text or len(kept) < len(text)
    assert not {tok.bos_id, tok.eos_id} & set(ids.tolist())
    assert all(0 <= i < tok.vocab_size for i in [*ids.tolist(), tok.bos_id, tok.eos_id])


@pytest.mark.parametrize('name', ['bytes', 'bpe.json'])
@given(text=st.text())
def test_decode_inverts_encode(loaded, name, text):
    tok = loaded[name]
    assert tok.decode([tok.bos_id, *tok.encode(text), tok.eos_id]) == text


@pytest.mark.parametrize('name', ['bytes', 'bpe.json', 'sentences.model'])
def test_half_a_character_decodes_to_a_replacement(loaded, name):
    tok = loaded[name]
    ids = tok.encode('a🙃')[:-1]
    assert '\ufffd' in tok.decode(ids)


@pytest.mark.parametrize('name', ['bytes', 'bpe.json', 'words.json', 'sentences.model'])
def test_saved_tokenizer_is_the_same(loaded, name, tmp_path):
    directory = epath.Path(tmp_path)
    again = tokenizer.load(loaded[name].save(directory), directory)
    assert again.fingerprint == loaded[name].fingerprint
    assert again.encode(SAMPLE) == loaded[name].encode(SAMPLE)
    assert len({tok.fingerprint for tok in loaded.values()}) == len(loaded)


def test_bytes_tokenizer_is_utf8(loaded):
    tok = loaded['bytes']
    assert tok.vocab_size == 256
    assert tok.encode(SAMPLE) == list(SAMPLE.encode())
    for special in (tok.bos_id, tok.eos_id):
        with pytest.raises(UnicodeDecodeError):
            bytes([special]).decode()


def test_shared_special_token(tmp_path):
    (tmp_path / 'tokenizer.json').write_text(whitespace_json(['<|endoftext|>']))
    tok = tokenizer.load(str(tmp_path / 'tokenizer.json'))
    assert tok.bos_id == tok.eos_id == 1


def test_trained_bpe_has_exactly_the_size_asked_for(loaded):
    assert loaded['bpe.json'].vocab_size == 277
    assert loaded['bpe.json'].bos_id != loaded['bpe.json'].eos_id
    long = 'the quick brown fox'
    assert len(loaded['bpe.json'].encode(long)) < len(long) / 2


@pytest.mark.parametrize(
    ('content', 'name', 'message'),
    [
        (None, 'missing.json', 'no such file'),
        (b'{"a": 1}', 'bad.json', 'not a tokenizer.json'),
        (b'\xff\xfe', 'binary.json', 'not a tokenizer.json'),
        (b'nonsense', 'bad.model', 'not a SentencePiece model'),
        (b'', 'tokenizer.txt', "must be 'bytes'"),
        (whitespace_json(['</s>']).encode(), 'no_bos.json', 'has no BOS'),
        (whitespace_json(['<s>']).encode(), 'no_eos.json', 'has no EOS'),
    ],
)
def test_unusable_tokenizers_are_refused(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenizer.load(str(tmp_path / name))


def test_sentencepiece_without_bos_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE.split('\n')), model_writer=model, vocab_size=60,
        hard_vocab_limit=False, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / 'a.model').write_bytes(model.getvalue())
    with pytest.raises(UserError, match='no BOS'):
        tokenizer.load(str(tmp_path / 'a.model'))


@pytest.mark.parametrize(('size', 'message'), [(257, '258 or more'), (5003, 'out of reach')])
def test_vocabulary_sizes_out_of_reach(tmp_path, size, message):
    with pytest.raises(UserError, match=message):
        train_bpe([SAMPLE], size, epath.Path(tmp_path) / 'bpe.json')
    assert not (tmp_path / 'bpe.json').exists()


def test_training_on_a_corpus_is_deterministic(tmp_path):
    (tmp_path / 'a.txt').write_text(SAMPLE)
    paths = [epath.Path(tmp_path) / name for name in ('1.json', '2.json')]
    for path in paths:
        train_bpe(corpora.texts(str(tmp_path / '*.txt')), 271, path)
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first == second
