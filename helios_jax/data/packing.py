"""Packs documents into rows of T tokens, cached as a TFDS data set of rows.

`best_fit`: a document is BOS … EOS; one longer than the row is cut into pieces that each start
with BOS, and pieces fill rows best-fit-decreasing. `concatenate`: the documents, each followed by
EOS, form one stream that is cut like one long document. Both work within one shard of documents,
so the number of workers changes nothing.

Neither this module nor its imports load jax: worker processes start without it.
"""

import concurrent.futures.process
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import loky
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt32

from helios_jax import display
from helios_jax.data import chat_template, encoding, manifest, records
from helios_jax.data.corpora import Document
from helios_jax.data.documents import Documents
from helios_jax.data.encoding import Piece
from helios_jax.data.tokenizer import Tokenizer
from helios_jax.errors import UserError

FORMAT = 1  # version of the stored rows, in their fingerprint
NAME = 'helios_rows'
SPLIT = 'rows'
STALE_SECONDS = 3600.0  # age at which the unfinished file of a dead process is removed


@dataclasses.dataclass(frozen=True)
class Packer:
    """Turns the documents of a shard into rows.

    Attributes:
      row_length: T, tokens.
      packing: 'best_fit' or 'concatenate'.
    """

    tokenizer: Tokenizer
    row_length: int
    packing: str

    def rows(self, documents: Iterable[Document]) -> list[list[Piece]]:
        """Returns the segments of each row, in the order of the documents that open the rows."""
        streams = encoding.streams(self.tokenizer, documents)
        if self.packing == 'concatenate':
            streams = iter([Piece(*map(np.concatenate, zip(*streams, strict=True)))])
        pieces = [piece for stream in streams for piece in self._cut(stream)]
        rows = best_fit([len(piece.tokens) for piece in pieces], self.row_length)
        return [[pieces[index] for index in row] for row in rows]

    def _cut(self, stream: Piece) -> Iterator[Piece]:
        zero = np.zeros(1, np.uint32)
        bos = Piece(zero + np.uint32(self.tokenizer.bos_id), zero, zero, np.array([True]))
        step = self.row_length - 1
        for start in range(0, len(stream.tokens), step):
            pairs = zip(bos, stream, strict=True)
            yield Piece(*(np.concatenate([b, s[start : start + step]]) for b, s in pairs))

    def lost_example(self, documents: Iterable[Document]) -> str:
        """Finds the first place where decoding does not give a text back, for a message."""
        for document in documents:
            for text, encoded in encoding.scored(self.tokenizer, document):
                if encoded.kept != text:
                    returned = self.tokenizer.decode(encoded.ids.tolist())
                    pairs = enumerate(itertools.zip_longest(text, returned))
                    first = next((index for index, (one, other) in pairs if one != other), 0)
                    shown = slice(max(0, first - 10), first + 20)
                    return f'{text[shown]!r} comes back as {returned[shown]!r}'
        return ''


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    Args:
      lengths: from 1 to `capacity`; equal ones are taken in their order.
    Returns:
      The indices in each bin, ascending; bins ascending by their first index.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room left
    occupied = 0  # bit r says that with_room[r] has a bin
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            occupied &= ~(int(not with_room[room]) << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if room > length:
            with_room[room - length].append(chosen)
            occupied |= 1 << (room - length)
    return sorted(sorted(row) for row in bins)


def pack(
    documents: Documents,
    packer: Packer,
    cache_dir: epath.Path,
    num_workers: int,
    rebuild: bool = False,
) -> epath.Path:
    """Packs one split into `cache_dir`, unless it is there; what a killed run finished is kept.

    Args:
      num_workers: processes; 0 takes every core.
      rebuild: packs it again whatever is there.
    Returns:
      The directory of a TFDS data set of rows, whose metadata has `fingerprint`, `num_tokens`
      (without padding), `num_bytes` (of text that is a target and that decoding gives back),
      `num_lost_bytes` (that it does not), `lost_example` and `row_length`; of conversations also
      `chat_template`, the template's fingerprint.
    Raises:
      UserError: damage to what was packed; a chat template that cannot be used.
    """
    chats = {}
    if documents.num_chats:
        chat_template.marks_answers(packer.tokenizer.chat_template)
        chats['chat_template'] = packer.tokenizer.chat_template.fingerprint
    fingerprint = records.digest(
        FORMAT, documents.fingerprint, documents.split, packer.tokenizer.fingerprint,
        packer.row_length, packer.packing, *chats.values(),
    )  # fmt: skip
    directory = cache_dir / 'rows' / fingerprint
    if manifest.is_complete(directory) and not rebuild:
        display.say(f'{_description(documents)}: cached')
    else:
        directory.mkdir(parents=True, exist_ok=True)
        shards = _run(_ShardJob(documents, packer, directory, rebuild), num_workers)
        metadata = {
            'fingerprint': fingerprint,
            'corpus': documents.corpus,
            'split': documents.split,
            'tokenizer': packer.tokenizer.name,
            'packing': packer.packing,
            'row_length': packer.row_length,
            'num_tokens': sum(shard['num_tokens'] for shard in shards),
            'num_bytes': sum(shard['num_text_bytes'] for shard in shards),
            'num_lost_bytes': sum(shard['num_lost_bytes'] for shard in shards),
            'lost_example': next((s['lost_example'] for s in shards if s['lost_example']), ''),
            **chats,
        }
        manifest.complete(directory, NAME, _features(packer, documents), metadata, {SPLIT: shards})
        for path in directory.iterdir():
            stale = path.name.endswith('.part') and path.stat().mtime < time.time() - STALE_SECONDS
            if stale or path.name.endswith('.stats.json'):
                path.unlink(missing_ok=True)
    manifest.verify(directory)
    return directory


@dataclasses.dataclass(frozen=True)
class _ShardJob:
    """Packs shard `index` of the documents; carries what a worker process needs."""

    documents: Documents
    packer: Packer
    directory: epath.Path
    rebuild: bool

    def __call__(self, index: int) -> dict[str, Any]:
        path = self.directory / records.shard_name(NAME, SPLIT, index)
        stats_path = self.directory / f'{path.name}.stats.json'
        if not self.rebuild and (finished := _finished(path, stats_path)):
            return finished
        documents = list(self.documents.shards()[index])
        rows = self.packer.rows(documents)
        features = _features(self.packer, self.documents)
        num_text_bytes = sum(_total(piece.num_bytes) for row in rows for piece in row)
        lost = sum(_total(piece.lost_bytes) for row in rows for piece in row)
        counts = {
            'num_tokens': sum(len(piece.tokens) for row in rows for piece in row),
            'num_text_bytes': num_text_bytes,
            'num_lost_bytes': lost,
            'lost_example': self.packer.lost_example(documents) if lost else '',
        }
        with records.shard(path, (_stored(row, features) for row in rows)) as written:
            # The shard's own name comes last: where it stands, so do its numbers.
            stats = counts | written
            records.write_text(stats_path, json.dumps([stats, records.digest(stats)]))
        return stats


def _finished(path: epath.Path, stats_path: epath.Path) -> dict[str, Any]:
    """Reads the numbers of a shard that an interrupted run left whole, or {}.

    Without its numbers a shard is an older version's, which did not count lost bytes.
    """
    try:
        stats, digest = json.loads(stats_path.read_text())
    except (OSError, ValueError, TypeError, RecursionError):  # whatever JSON else it may be
        return {}
    return stats if path.exists() and digest == records.digest(stats) else {}


def _description(documents: Documents) -> str:
    return f'Packing {documents.corpus} ({documents.split})'


def _run(job: _ShardJob, num_workers: int) -> list[dict[str, Any]]:
    """Returns every shard's numbers, in order, whichever process packed it."""
    num_shards = len(job.documents.shards())
    # A process takes seconds to start: each gets two shards or more.
    num_workers = max(1, min(num_workers or os.cpu_count() or 1, num_shards // 2))
    with display.phase(_description(job.documents), num_shards, 'shards') as advance:
        shards = []
        for shard in _map(job, num_shards, num_workers):
            shards.append(shard)
            advance(1)
    return shards


def _map(
    job: Callable[[int], dict[str, Any]], num_shards: int, num_workers: int
) -> Iterator[dict[str, Any]]:
    if num_workers == 1:
        yield from map(job, range(num_shards))
        return
    # A fork of a process with jax deadlocks, and a spawned process of the standard library
    # imports its parent's __main__, which may be unguarded or import jax; loky's does neither.
    pool = loky.ProcessPoolExecutor(num_workers, env={'TOKENIZERS_PARALLELISM': 'false'})
    try:
        for result in [pool.submit(job, index) for index in range(num_shards)]:
            yield result.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            f'one of the {num_workers} processes that tokenize was killed, which happens when '
            'memory runs out; set data.num_workers to fewer.'
        ) from None
    finally:
        pool.shutdown(kill_workers=True)


def _features(packer: Packer, documents: Documents) -> tfds.features.FeaturesDict:
    """Features of a stored row; segment ids and positions are rebuilt from segment lengths."""

    def array(dtype: Any) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding='bytes')

    features = {
        'tokens': array(np.min_scalar_type(packer.tokenizer.vocab_size - 1)),
        'segment_lengths': array(np.min_scalar_type(packer.row_length)),
        'num_bytes': tfds.features.Scalar(np.int64),
    }
    if documents.num_prompts or documents.num_chats:
        features['loss_mask'] = array(np.uint8)
    return tfds.features.FeaturesDict(features)


def _total(num_bytes: UInt32[np.ndarray, 'tokens']) -> int:
    return int(num_bytes.sum(dtype=np.int64))


def _stored(row: list[Piece], features: tfds.features.FeaturesDict) -> records.Stored:
    arrays: dict[str, Any] = {
        'tokens': np.concatenate([piece.tokens for piece in row]),
        'segment_lengths': np.array([len(piece.tokens) for piece in row]),
    }
    if 'loss_mask' in features:
        arrays['loss_mask'] = np.concatenate([piece.is_target for piece in row])
    stored = {
        name: values.astype(features[name].np_dtype).tobytes() for name, values in arrays.items()
    }
    return stored | {'num_bytes': sum(_total(piece.num_bytes) for piece in row)}
