"""Text to token ids and back, with the bytes of source text that each token stands for.

Three kinds: bytes (the default, no file), any tokenizer.json of the `tokenizers` library, and
SentencePiece models. Text is only text: the name of a special token inside a document is encoded
letter by letter, so a document can never contain BOS or EOS.
"""

import abc
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from jaxtyping import Int64, UInt32

from helios_jax.config import UserError

# In order of preference. GPT-2 has one token for both; BERT's brackets come last.
BOS_NAMES = ('<|bos|>', '<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '[BOS]')
EOS_NAMES = ('<|eos|>', '</s>', '<eos>', '<|end_of_text|>', '[EOS]')
SHARED_NAMES = ('<|endoftext|>',)

# Token ids, and the bytes of each.
Encoded = tuple[UInt32[np.ndarray, 'tokens'], UInt32[np.ndarray, 'tokens']]


class Tokenizer(abc.ABC):
    """What every tokenizer offers.

    Attributes:
      name: for people, such as 'bytes' or the file's name.
      fingerprint: equal for tokenizers that encode alike, different otherwise.
      vocab_size: V; every id is below it.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int

    @abc.abstractmethod
    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        """Per text: its token ids and, for each token, how many UTF-8 bytes of it are the token's.

        The bytes of a text's tokens add up to its length in UTF-8, unless it has no tokens. BOS
        and EOS are not added.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, BOS and EOS left out, invalid UTF-8 replaced by U+FFFD."""

    @abc.abstractmethod
    def save(self, directory: epath.Path) -> str:
        """Writes what `load` needs into `directory`; returns the spec to give to `load` with it."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids, _ in self.encode_with_bytes(texts)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """One token a byte. BOS and EOS are 0xFE and 0xFF, bytes that no UTF-8 text contains."""

    name = 'bytes'
    fingerprint = 'bytes'
    vocab_size = 256
    bos_id = 0xFE
    eos_id = 0xFF

    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        encoded = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        return [(ids, np.ones_like(ids)) for ids in encoded]

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

    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        # Offsets cost more than the encoding; most byte-level tokens need none.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.asarray(encoding.ids, np.uint32)
            num_bytes = self._token_bytes[ids]
            if num_bytes.sum(dtype=np.int64) != len(text.encode()):
                num_bytes = self._bytes_by_offset(text)
            encoded.append((ids, num_bytes))
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
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f'data.tokenizer={name!r} has no BOS or no EOS piece; train it with bos_id and '
                'eos_id switched on.'
            )

    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        mapped = self._processor.encode(
            list(texts), return_type='offset_mapping', return_bytes=True
        )
        encoded = []
        for text, pieces in zip(texts, mapped, strict=True):
            byte_ends = np.asarray([end for _, end in pieces['offsets']], np.int64)
            encoded.append(
                (np.asarray(pieces['ids'], np.uint32), _bytes_per_token(byte_ends, text))
            )
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i not in (self.bos_id, self.eos_id)])

    def save(self, directory: epath.Path) -> str:
        (directory / 'tokenizer.model').write_bytes(self._content)
        return 'tokenizer.model'


def load(spec: str, directory: epath.Path | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
      spec: 'bytes', or the path of a tokenizer.json or of a SentencePiece .model.
      directory: where a relative `spec` is looked for: that of `Tokenizer.save`.
    Raises:
      UserError: no such file, not a tokenizer, or one without BOS and EOS.
    """
    if spec == 'bytes':
        return ByteTokenizer()
    path = epath.Path(spec).expanduser() if directory is None else directory / spec
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

    Of any other vocabulary these are merely numbers, which do not add up to a text's length.
    """
    lengths = np.zeros(size, np.uint32)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    return lengths


def _bytes_per_token(
    byte_ends: Int64[np.ndarray, 'tokens'], text: str
) -> UInt32[np.ndarray, 'tokens']:
    """Bytes per token, from where each one ends in the UTF-8 text.

    One character's tokens share its bytes as their ends say; what a normaliser drops goes to the
    token after it, or to the last one.
    """
    ends = np.maximum.accumulate(byte_ends)
    ends[-1:] = len(text.encode())
    return np.diff(ends, prepend=0).astype(np.uint32)
