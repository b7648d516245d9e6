"""Stores a corpus as a TFDS data set of documents, `helios_text`.

Each document goes to train or validation by a hash of its content, so the split depends on
neither order nor names, and equal documents stay on one side.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from helios_jax import display
from helios_jax.data import corpora, manifest, records
from helios_jax.data.corpora import Document
from helios_jax.errors import UserError

FORMAT = 2  # version of the stored documents, in their directory's name
NAME = 'helios_text'
# A shard's documents are packed together. Shards are small at first, so that a small corpus is
# worked on in parallel, and up to 16 times as large as they add up.
SHARD_BYTES = 2**23


@dataclasses.dataclass(frozen=True)
class Documents:
    """One split of a prepared corpus; `directory` is a TFDS data set."""

    corpus: str
    split: str
    directory: epath.Path
    fingerprint: str  # digest of the documents in their order
    num_documents: int
    num_bytes: int  # UTF-8, prompts included; of conversations, their JSON
    num_prompts: int  # documents that have one
    num_chats: int = 0  # conversations

    def shards(self) -> list[Iterator[Document]]:
        """Returns an iterator over the documents of each shard, in order."""
        info = tfds.builder_from_directory(self.directory).info
        source = records.Records(info, self.split)
        return [map(_document, source.shard(index)) for index in range(len(source.shard_lengths))]


def prepare(
    corpus: str, cache_dir: epath.Path, validation_fraction: float, rebuild: bool = False
) -> dict[str, Documents]:
    """Prepares one corpus below `cache_dir`, unless it is there, unchanged.

    Changes of files are found without reading them; `paths.identities` says how.

    Args:
      validation_fraction: 0 puts every document into train, and there is no validation split.
      rebuild: prepares it again whatever is there.
    Raises:
      UserError: as `corpora.read` says, no documents, or damage to what was prepared.
    """
    state = corpora.state(corpus)
    directory = cache_dir / 'documents' / records.digest(FORMAT, state, validation_fraction)
    if manifest.is_complete(directory) and not rebuild:
        display.say(f'Reading {corpus}: cached')
    else:
        directory.mkdir(parents=True, exist_ok=True)
        names = ['train', 'validation'] if validation_fraction else ['train']
        splits = {name: _SplitWriter(directory, name) for name in names}
        try:
            _read_into(splits, corpus, validation_fraction)
            if corpora.state(corpus) != state:
                raise UserError(
                    f'data.corpus={corpus!r} was changed while it was read; start again.'
                )
        except BaseException:
            if not manifest.is_complete(directory):  # nor completed by another process
                for split in splits.values():
                    split.remove()
            raise
        _complete(directory, splits)
    manifest.verify(directory)
    metadata = tfds.builder_from_directory(directory).info.metadata
    return {
        split: Documents(corpus=corpus, split=split, directory=directory, **values)
        for split, values in metadata.items()
    }


def _read_into(splits: 'dict[str, _SplitWriter]', corpus: str, validation_fraction: float) -> None:
    with display.phase(f'Reading {corpus}', unit='documents') as advance:
        for document in corpora.read(corpus):
            validation = _unit_hash(document) < validation_fraction
            splits['validation' if validation else 'train'].add(document)
            advance(1)
    num_documents = sum(split.num_documents for split in splits.values())
    if not num_documents:
        raise UserError(f'data.corpus={corpus!r} is empty: no document has any text.')
    for split in splits.values():
        split.flush()
        if not split.num_documents:
            raise UserError(
                f'data.corpus={corpus!r}: none of its {num_documents} documents is in the '
                f'{split.name} split; give more documents or change '
                f'data.validation_fraction={validation_fraction}.'
            )


def _complete(directory: epath.Path, splits: 'dict[str, _SplitWriter]') -> None:
    names = ['prompt', 'text']
    if any(split.num_chats for split in splits.values()):
        names += ['messages', 'place']
    manifest.complete(
        directory,
        NAME,
        tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
        {name: split.metadata() for name, split in splits.items()},
        {name: split.shards for name, split in splits.items()},
    )


class _SplitWriter:
    """Collects a shard's documents and writes them. A shard is a run of documents."""

    def __init__(self, directory: epath.Path, name: str):
        self.name = name
        self._directory = directory
        self._pending: list[records.Stored] = []
        self._pending_bytes = 0
        self.shards: list[dict[str, int]] = []
        self._hash = hashlib.sha256()
        self.num_documents = self._num_bytes = self._num_prompts = self.num_chats = 0

    def add(self, document: Document) -> None:
        fields = {name: value.encode() for name, value in document._asdict().items()}
        prompt, text, messages = fields['prompt'], fields['text'], fields['messages']
        if messages:
            self._pending.append(fields)
            self._hash.update(b'messages %d ' % len(messages) + messages)
        else:
            self._pending.append({'prompt': prompt, 'text': text})
            self._hash.update(b'%d %d ' % (len(prompt), len(text)) + prompt + text)
        self._pending_bytes += len(prompt) + len(text) + len(messages)
        self.num_documents += 1
        self._num_prompts += bool(prompt)
        self.num_chats += bool(messages)
        if self._pending_bytes >= SHARD_BYTES << min(len(self.shards) // 32, 4):
            self.flush()

    def flush(self) -> None:
        if self._pending:
            with records.shard(self._path(len(self.shards)), self._pending) as written:
                self.shards.append(written)
        self._num_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def remove(self) -> None:
        """Deletes the shards written so far: the data set will not be completed."""
        for index in range(len(self.shards)):
            self._path(index).unlink(missing_ok=True)

    def _path(self, index: int) -> epath.Path:
        return self._directory / records.shard_name(NAME, self.name, index)

    def metadata(self) -> dict[str, Any]:
        return {
            'fingerprint': self._hash.hexdigest()[:16],
            'num_documents': self.num_documents,
            'num_bytes': self._num_bytes,
            'num_prompts': self._num_prompts,
        } | ({'num_chats': self.num_chats} if self.num_chats else {})


def _document(example: dict[str, Any]) -> Document:
    """Document of a stored example, in which one that is no conversation lacks two fields."""
    return Document(*((example.get(name) or b'').decode() for name in Document._fields))


def _unit_hash(document: Document) -> float:
    content = (document.messages or f'{document.prompt}\0{document.text}').encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64
