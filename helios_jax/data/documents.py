"""The TFDS data set of documents, `helios_text`, that a corpus becomes.

Each document goes to train or validation by a hash of its content, so the split depends on
neither order nor names, and equal documents stay on one side.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from helios_jax import display
from helios_jax.config import UserError
from helios_jax.data import corpora, records
from helios_jax.data.corpora import Document

FORMAT = 1  # of the stored documents; part of their directory's name
# A shard's documents are packed together. Shards are small at first, so that a small corpus is
# worked on in parallel, and up to 16 times as large as they add up.
SHARD_BYTES = 2**23


@dataclasses.dataclass(frozen=True)
class Documents:
    """One split of a prepared corpus; `directory` is a TFDS data set."""

    corpus: str
    split: str
    directory: epath.Path
    fingerprint: str  # of the documents in their order
    num_documents: int
    num_bytes: int  # UTF-8, prompts included
    num_prompts: int  # documents that have one


def prepare(corpus: str, cache_dir: epath.Path, validation_fraction: float) -> dict[str, Documents]:
    """Prepares one corpus below `cache_dir`, unless it is there, unchanged.

    Files are taken as unchanged when their names, sizes and times of change are.

    Args:
      validation_fraction: 0 puts every document into train, and there is no validation split.
    """
    key = records.digest(FORMAT, corpora.state(corpus), validation_fraction)
    data_dir = cache_dir / 'documents' / key
    builder = HeliosText(
        corpus=corpus, validation_fraction=validation_fraction, data_dir=os.fspath(data_dir)
    )
    directory = epath.Path(builder.data_dir)
    prepared = directory / 'dataset_info.json'
    if prepared.exists():
        display.say(f'Reading {corpus}: cached')
    else:
        try:
            # TFDS announces a download, which this is not.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_dir=cache_dir / 'documents', file_format='array_record'
                )
        except OSError:
            if not prepared.exists():  # else another process was first
                raise
    metadata = tfds.builder_from_directory(directory).info.metadata
    return {
        split: Documents(corpus=corpus, split=split, directory=directory, **values)
        for split, values in metadata.items()
    }


class HeliosText(tfds.core.DatasetBuilder):
    """Documents {'prompt', 'text'} of one corpus, in splits train and validation.

    Not a GeneratorBasedBuilder: that one holds a split in memory to shuffle it, and above 1 GB
    needs TensorFlow. Each shard holds a run of documents that are packed together.
    """

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, *, corpus: str, validation_fraction: float, **kwargs: Any):
        self._corpus = corpus
        self._validation_fraction = validation_fraction
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {'prompt': tfds.features.Text(), 'text': tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, metadata=tfds.core.MetadataDict()
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        names = ['train', 'validation'] if self._validation_fraction else ['train']
        splits = {name: _SplitWriter(self, name) for name in names}
        with display.phase(f'Reading {self._corpus}', unit='documents') as advance:
            for document in corpora.read(self._corpus):
                validation = _unit_hash(document) < self._validation_fraction
                splits['validation' if validation else 'train'].add(document)
                advance(1)
        num_documents = sum(split.num_documents for split in splits.values())
        if not num_documents:
            raise UserError(f'data.corpus={self._corpus!r} is empty: no document has any text.')
        for split in splits.values():
            if not split.num_documents:
                raise UserError(
                    f'data.corpus={self._corpus!r}: none of its {num_documents} documents is in '
                    f'the {split.name} split; give more documents or change '
                    f'data.validation_fraction={self._validation_fraction}.'
                )
        self.info.set_splits(tfds.core.SplitDict([split.finish() for split in splits.values()]))
        self.info.metadata.update({split.name: split.metadata() for split in splits.values()})

    def _as_dataset(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError('array_record is read at random: use as_data_source.')


class _SplitWriter:
    """Collects a shard's documents and writes them."""

    def __init__(self, builder: HeliosText, name: str):
        self.name = name
        self._builder = builder
        self._pending: list[records.Stored] = []
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []
        self._hash = hashlib.sha256()
        self.num_documents = self._num_bytes = self._num_prompts = 0

    def add(self, document: Document) -> None:
        prompt, text = document.prompt.encode(), document.text.encode()
        self._pending.append({'prompt': prompt, 'text': text})
        self._hash.update(b'%d %d ' % (len(prompt), len(text)) + prompt + text)
        self._pending_bytes += len(prompt) + len(text)
        self.num_documents += 1
        self._num_prompts += bool(prompt)
        if self._pending_bytes >= SHARD_BYTES << min(len(self._shards) // 32, 4):
            self._flush()

    def _flush(self) -> None:
        name = records.shard_name(self._builder.name, self.name, len(self._shards))
        path = epath.Path(self._builder.data_dir) / name
        with records.shard(path, self._pending) as written:
            self._shards.append(written)
        self._num_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def finish(self) -> tfds.core.SplitInfo:
        if self._pending:
            self._flush()
        directory = epath.Path(self._builder.data_dir)
        return records.split_info(directory, self._builder.name, self.name, self._shards)

    def metadata(self) -> dict[str, Any]:
        return {
            'fingerprint': self._hash.hexdigest()[:16],
            'num_documents': self.num_documents,
            'num_bytes': self._num_bytes,
            'num_prompts': self._num_prompts,
        }


def _unit_hash(document: Document) -> float:
    content = f'{document.prompt}\0{document.text}'.encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64
