"""Turns text into token ids and back, with the bytes of text that each token gives back.

Three kinds: bytes (the default, no file), any tokenizer.json of the `tokenizers` library, and
SentencePiece models. Text is only text: the name of a special token inside a document is encoded
letter by letter, so a document can never contain BOS or EOS.
"""

import abc
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from jaxtyping import Int64, UInt32

from helios_jax import paths
from helios_jax.data import lossy
from helios_jax.data.lossy import Encoded
from helios_jax.errors import UserError

# In order of preference. GPT-2 has one token for both; BERT's brackets come last.
BOS_NAMES = ('<|bos|>', '<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '[BOS]')
EOS_NAMES = ('<|eos|>', '</s>', '<eos>', '<|end_of_text|>', '[EOS]')
SHARED_NAMES = ('<|endoftext|>',)


class Tokenizer(abc.ABC):
    """Interface of every tokenizer.

    Attributes:
      name: for people, such as 'bytes' or the file's name.
      fingerprint: equal for tokenizers that encode alike, different otherwise.
      vocab_size: V; every id is below it.
      unk_id: the token that stands for text outside the vocabulary; -1 where there is none.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text as token ids, without BOS and EOS."""

    @abc.abstractmethod
    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        """Encodes each text, and counts the UTF-8 bytes that each token gives back."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decodes `ids` to text, without BOS and EOS, invalid UTF-8 replaced by U+FFFD."""

    @abc.abstractmethod
    def save(self, directory: epath.Path) -> str:
        """Writes what `load` needs into `directory`; returns the spec to give to `load` with it."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """One token a byte. BOS and EOS are 0xFE and 0xFF, bytes that no UTF-8 text contains."""

    name = 'bytes'
    fingerprint = 'bytes'
    vocab_size = 256
    bos_id = 0xFE
    eos_id = 0xFF
    unk_id = -1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        encoded = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        return [
            Encoded(ids, np.ones_like(ids), text) for text, ids in zip(texts, encoded, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        kept = bytes(i for i in ids if i not in (self.bos_id, self.eos_id))
        return kept.decode(errors='replace')

    def save(self, directory: epath.Path) -> str:
        return 'bytes'


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, content: bytes, name: str):
        self._content = content
        self.name = name
        self.fingerprint = hashlib.sha256(self._content).hexdigest()[:16]
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._content.decode())
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f'data.tokenizer={name!r} is not a tokenizer.json that `tokenizers` '
                f'{tokenizers.__version__} can read: {error}'
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._token_bytes = _byte_lengths(vocabulary, self.vocab_size)
        self.bos_id = vocabulary[_special(name, 'BOS', BOS_NAMES + SHARED_NAMES, vocabulary)]
        self.eos_id = vocabulary[_special(name, 'EOS', EOS_NAMES + SHARED_NAMES, vocabulary)]
        self.unk_id = _unknown(json.loads(self._content)['model'], vocabulary)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Offsets cost more than the encoding; most byte-level tokens need none.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        batch = self.encode_batch(texts)
        decoded = self._tokenizer.decode_batch(batch, skip_special_tokens=False)
        encoded = []
        for text, ids, returned in zip(texts, batch, decoded, strict=True):
            if not lossy.keeps_all(self, text, ids, returned):
                spans = self._tokenizer.encode(text, add_special_tokens=False).offsets
                encoded.append(lossy.partly(self, text, ids, spans))
                continue
            array = np.asarray(ids, np.uint32)
            num_bytes = self._token_bytes[array]
            if num_bytes.sum(dtype=np.int64) != len(text.encode()):
                num_bytes = self._bytes_by_offset(text)
            encoded.append(Encoded(array, num_bytes, text))
        return encoded

    def _bytes_by_offset(self, text: str) -> UInt32[np.ndarray, 'tokens']:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        char_ends = np.asarray([end for _, end in encoding.offsets], np.int64)
        code_points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
        widths = 1 + sum((code_points > limit).astype(np.int64) for limit in (0x7F, 0x7FF, 0xFFFF))
        return _bytes_per_token(np.concatenate([[0], np.cumsum(widths)])[char_ends], text)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in (self.bos_id, self.eos_id)]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, directory: epath.Path) -> str:
        (directory / 'tokenizer.json').write_bytes(self._content)
        return 'tokenizer.json'


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model."""

    def __init__(self, content: bytes, name: str):
        self._content = content
        self.name = name
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise UserError(f'data.tokenizer={name!r} is not a SentencePiece model.') from None
        self.vocab_size = self._processor.get_piece_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f'data.tokenizer={name!r} has no BOS or no EOS piece; train it with bos_id and '
                'eos_id switched on.'
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        mapped = self._processor.encode(
            list(texts), return_type='offset_mapping', return_bytes=True
        )
        encoded = []
        for text, pieces in zip(texts, mapped, strict=True):
            ids = list(pieces['ids'])
            if lossy.keeps_all(self, text, ids, self._processor.decode(ids)):
                byte_ends = np.asarray([end for _, end in pieces['offsets']], np.int64)
                num_bytes = _bytes_per_token(byte_ends, text)
                encoded.append(Encoded(np.asarray(ids, np.uint32), num_bytes, text))
            else:
                in_characters = self._processor.encode(text, return_type='offset_mapping')
                encoded.append(lossy.partly(self, text, ids, in_characters['offsets']))
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i not in (self.bos_id, self.eos_id)])

    def save(self, directory: epath.Path) -> str:
        (directory / 'tokenizer.model').write_bytes(self._content)
        return 'tokenizer.model'


def load(spec: str, directory: epath.Path | None = None) -> Tokenizer:
    """Loads the tokenizer that `spec` names.

    Args:
      spec: 'bytes', or the path of a tokenizer.json or of a SentencePiece .model.
      directory: where a relative `spec` is looked for: that of `Tokenizer.save`.
    Raises:
      UserError: no such file, not a tokenizer, or one without BOS and EOS.
    """
    if spec == 'bytes':
        return ByteTokenizer()
    path = epath.Path(spec).expanduser() if directory is None else directory / spec
    paths.check('data.tokenizer', spec)
    if path.suffix not in ('.json', '.model'):
        raise UserError(
            f"data.tokenizer={spec!r} must be 'bytes', a tokenizer.json or a SentencePiece .model."
        )
    if not path.is_file():
        raise UserError(f'data.tokenizer={spec!r}: no such file.')
    kind = JsonTokenizer if path.suffix == '.json' else SentencePieceTokenizer
    return kind(path.read_bytes(), path.name)


def train_bpe(documents: Iterable[str], vocab_size: int, path: epath.Path) -> None:
    """Trains a byte-level BPE of exactly `vocab_size` tokens, with <|bos|> and <|eos|>.

    Args:
      path: where the tokenizer.json goes.
    Raises:
      UserError: `vocab_size` leaves no room for the bytes, or the text is too small to fill it.
    """
    smallest = 256 + 2
    if vocab_size < smallest:
        raise UserError(
            f'vocab_size={vocab_size} must be {smallest} or more: the bytes, BOS and EOS.'
        )
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<|bos|>', '<|eos|>'],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise UserError(
            f'vocab_size={vocab_size} is out of reach: the text gives only '
            f'{bpe.get_vocab_size()} tokens; ask for fewer or train on more text.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(bpe.to_str()), ensure_ascii=False))


def _special(name: str, role: str, candidates: Sequence[str], vocabulary: dict[str, int]) -> str:
    for candidate in candidates:
        if candidate in vocabulary:
            return candidate
    raise UserError(
        f'data.tokenizer={name!r} has no {role}: none of {", ".join(candidates)} is in it.'
    )


def _byte_lengths(vocabulary: dict[str, int], size: int) -> UInt32[np.ndarray, 'V']:
    """Bytes of each token of a byte-level vocabulary, where one character stands for one byte.

    For any other vocabulary the numbers mean nothing: they do not add up to a text's length.
    """
    lengths = np.zeros(size, np.uint32)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    return lengths


def _bytes_per_token(
    byte_ends: Int64[np.ndarray, 'tokens'], text: str
) -> UInt32[np.ndarray, 'tokens']:
    """Bytes per token, from where each one ends in the UTF-8 text.

    One character's tokens share its bytes as their ends say; white space that decoding puts between
    tokens goes to the token after it, or to the last one.
    """
    ends = np.maximum.accumulate(byte_ends)
    ends[-1:] = len(text.encode())
    return np.diff(ends, prepend=0).astype(np.uint32)


def _unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int:
    """Id that a tokenizer.json gives to what is not in its vocabulary; -1 without one."""
    number = model.get('unk_id')  # Unigram has its number, the others its name
    return vocabulary.get(model.get('unk_token') or '', -1) if number is None else number
