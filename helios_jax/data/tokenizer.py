"""Turns text into token ids and back, with the bytes of text that each token gives back.

Three kinds: bytes (the default, no file), any tokenizer.json of the `tokenizers` library, and
SentencePiece models. Text is only text: the name of a special token inside a document is encoded
letter by letter, so a document can never contain BOS or EOS. `encode_rendered` alone reads names of
special tokens as these tokens: a chat template writes them.
"""

import abc
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from jaxtyping import UInt32

from helios_jax import paths
from helios_jax.data import chat_template, lossy, special
from helios_jax.data.lossy import Encoded
from helios_jax.data.special import Spanned
from helios_jax.errors import UserError

GENERATION = 'generation_config.json'  # beside a tokenizer's file, as transformers writes it


class Tokenizer(abc.ABC):
    """Interface of every tokenizer.

    Attributes:
      name: for people, such as 'bytes' or the file's name.
      fingerprint: equal for tokenizers that encode alike, different otherwise.
      vocab_size: V; every id is below it.
      unk_id: the token that stands for text outside the vocabulary; -1 where there is none.
      special_ids: ids of the tokens that no text gives, by the names that templates write.
      folder: where the tokenizer's file lies; None without one.
      chat_setting: `data.chat_template`.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    special_ids: dict[str, int]
    folder: epath.Path | None = None
    chat_setting: str = ''

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text as token ids, without BOS and EOS."""

    @abc.abstractmethod
    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        """Encodes each text, and counts the UTF-8 bytes that each token gives back."""

    @abc.abstractmethod
    def encode_rendered(self, text: str) -> Spanned:
        """Encodes a text in which the name of a special token is that token."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decodes `ids` to text, without BOS and EOS, invalid UTF-8 replaced by U+FFFD."""

    @abc.abstractmethod
    def save(self, directory: epath.Path) -> str:
        """Writes what `load` needs into `directory`; returns the spec to give to `load` with it."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    @functools.cached_property
    def chat_template(self) -> chat_template.Template:
        """The template of `data.chat_template`, the tokenizer's own, or the built-in one.

        Raises:
          UserError: a file of it is absent or cannot be read.
        """
        names = {index: name for name, index in self.special_ids.items()}
        tokens = {'bos_token': names.get(self.bos_id, ''), 'eos_token': names.get(self.eos_id, '')}
        return chat_template.find(self.folder, self.chat_setting, tokens)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text beside EOS, by the generation_config.json next to the tokenizer.

        Raises:
          UserError: that file is no JSON object, or has an end that is no token's number.
        """
        path = self.folder / GENERATION if self.folder else None
        if path is None or not path.is_file():
            return ()
        try:
            said = json.loads(path.read_bytes()).get('eos_token_id')
        except (ValueError, RecursionError, AttributeError):
            raise UserError(f'{path} is no JSON object; mend it, or take it away.') from None
        return special.end_ids(said, self.vocab_size, str(path))

    @functools.cached_property
    def special_starts(self) -> re.Pattern[str]:
        """Finds the first character of each name of a special token, of two characters or more."""
        return special.starts(self.special_ids)


class ByteTokenizer(Tokenizer):
    """One token a byte. BOS and EOS are 0xFE and 0xFF, bytes that no UTF-8 text contains."""

    name = 'bytes'
    fingerprint = 'bytes'
    vocab_size = 256
    bos_id = 0xFE
    eos_id = 0xFF
    unk_id = -1
    special_ids = {'<|bos|>': bos_id, '<|eos|>': eos_id}  # noqa: RUF012

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        encoded = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        return [
            Encoded(ids, np.ones_like(ids), text) for text, ids in zip(texts, encoded, strict=True)
        ]

    def encode_rendered(self, text: str) -> Spanned:
        return special.in_parts(text, self.special_ids, self._spanned)

    def _spanned(self, text: str) -> Spanned:
        encoded = [(byte, i) for i, character in enumerate(text) for byte in character.encode()]
        return Spanned([byte for byte, _ in encoded], [(i, i + 1) for _, i in encoded])

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
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.special_ids = {token.content: index for index, token in added if token.special}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._token_bytes = lossy.token_lengths(vocabulary, self.vocab_size)
        self.bos_id = special.find(name, 'BOS', vocabulary)
        self.eos_id = special.find(name, 'EOS', vocabulary)
        self.unk_id = special.unknown(json.loads(self._content)['model'], vocabulary)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._tokenizer.encode_special_tokens = True  # pickling forgets it

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
        spans = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return lossy.bytes_per_token(lossy.byte_ends(spans, text), text)

    def encode_rendered(self, text: str) -> Spanned:
        encoding = self._with_specials.encode(text, add_special_tokens=False)
        return Spanned(encoding.ids, encoding.offsets)

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which finds special tokens in text."""
        made = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        made.post_processor = None  # that of byte-level BPE takes spaces out of the spans
        return made

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
        pieces = range(self.vocab_size)
        control = [index for index in pieces if self._processor.is_control(index)]
        self.special_ids = {self._processor.id_to_piece(index): index for index in control}
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
                num_bytes = lossy.bytes_per_token(byte_ends, text)
                encoded.append(Encoded(np.asarray(ids, np.uint32), num_bytes, text))
            else:
                in_characters = self._processor.encode(text, return_type='offset_mapping')
                encoded.append(lossy.partly(self, text, ids, in_characters['offsets']))
        return encoded

    def encode_rendered(self, text: str) -> Spanned:
        return special.in_parts(text, self.special_ids, self._spanned)

    def _spanned(self, text: str) -> Spanned:
        mapped = self._processor.encode(text, return_type='offset_mapping')
        return Spanned(list(mapped['ids']), list(mapped['offsets']))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i not in (self.bos_id, self.eos_id)])

    def save(self, directory: epath.Path) -> str:
        (directory / 'tokenizer.model').write_bytes(self._content)
        return 'tokenizer.model'


def load(spec: str, directory: epath.Path | None = None, chat_setting: str = '') -> Tokenizer:
    """Loads the tokenizer that `spec` names.

    Args:
      spec: 'bytes', or the path of a tokenizer.json or of a SentencePiece .model.
      directory: where a relative `spec` is looked for: that of `Tokenizer.save`.
      chat_setting: `data.chat_template`; '' takes the tokenizer's own when there are conversations.
    Raises:
      UserError: no such file, not a tokenizer, or one without BOS and EOS; a `chat_setting` that is
        no chat template.
    """
    tokenizer, path = _loaded(spec, directory)
    tokenizer.folder = directory if path is None else path.parent
    tokenizer.chat_setting = chat_setting
    if chat_setting:
        chat_template.marks_answers(tokenizer.chat_template)
    return tokenizer


def _loaded(spec: str, directory: epath.Path | None) -> tuple[Tokenizer, epath.Path | None]:
    if spec == 'bytes':
        return ByteTokenizer(), None
    path = epath.Path(spec).expanduser() if directory is None else directory / spec
    paths.check('data.tokenizer', spec)
    if path.suffix not in ('.json', '.model'):
        raise UserError(
            f"data.tokenizer={spec!r} must be 'bytes', a tokenizer.json or a SentencePiece .model."
        )
    if not path.is_file():
        raise UserError(f'data.tokenizer={spec!r}: no such file.')
    kind = JsonTokenizer if path.suffix == '.json' else SentencePieceTokenizer
    return kind(path.read_bytes(), path.name), path
