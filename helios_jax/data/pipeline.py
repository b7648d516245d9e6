"""Packed rows to batches: a pure function of data, seed and samples consumed.

Sample i of a run belongs to a corpus and to a row of it by arithmetic alone: corpora take turns in
proportion to their weights, and each goes through its rows in a new random order every epoch. So
resuming needs one number, and hosts, which each read their slice of a batch, cannot change it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Int32

from helios_jax import config
from helios_jax.data import corpora, documents, packing, records
from helios_jax.data.tokenizer import Tokenizer, train_bpe

Array = Any  # NumPy's on a host, jax's on the mesh


class Batch(NamedTuple):
    """Rows of T tokens; segment 0 is padding, with token 0, position 0 and no target."""

    tokens: Int32[Array, 'B T']
    segment_ids: Int32[Array, 'B T']  # from 1 in each row
    positions: Int32[Array, 'B T']  # from 0 in each segment
    loss_mask: Bool[Array, 'B T']  # whether the token counts as a target: False for prompts
    num_bytes: Int32[Array, 'B']  # UTF-8 bytes of the text among the row's targets


class Rows:
    """One packed corpus split, row by row.

    Attributes:
      fingerprint: of corpus, tokenizer, row length, packing, split and format.
      row_length: T, tokens.
      num_tokens: all but padding.
      num_bytes: UTF-8 bytes of text that is a target.
    """

    def __init__(self, directory: epath.Path):
        info = tfds.builder_from_directory(directory).info
        self.directory = directory
        self.corpus: str = info.metadata['corpus']
        self.split: str = info.metadata['split']
        self.fingerprint: str = info.metadata['fingerprint']
        self.row_length: int = info.metadata['row_length']
        self.num_tokens: int = info.metadata['num_tokens']
        self.num_bytes: int = info.metadata['num_bytes']
        self._records = records.Records(info, packing.SPLIT)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The stored row: tokens, segment_lengths, num_bytes and, with prompts, loss_mask."""
        return self._records[index]


@dataclasses.dataclass(frozen=True)
class Source:
    """Several corpora's rows and the share of samples that each gives, adding up to 1."""

    parts: tuple[Rows, ...]
    weights: tuple[Fraction, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def row_length(self) -> int:
        return self.parts[0].row_length

    @property
    def num_tokens(self) -> int:
        return sum(rows.num_tokens for rows in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(rows.num_bytes for rows in self.parts)

    @functools.cached_property
    def fingerprint(self) -> str:
        parts = zip(self.parts, self.weights, strict=True)
        return records.digest([[rows.fingerprint, str(weight)] for rows, weight in parts])

    @functools.cached_property
    def _shares(self) -> list[int]:
        """The weights as integers: exact, and faster than fractions."""
        denominator = math.lcm(*(weight.denominator for weight in self.weights))
        return [int(weight * denominator) for weight in self.weights]

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples each corpus gives: its share, rounded.

        The first corpus takes its share of all, the second its share of the rest, and so on, each
        rounded up: counts never decrease as samples are added, and always add up.
        """
        counts, rest, shares_left = [], num_samples, sum(self._shares)
        for share in self._shares:
            counts.append(-(-rest * share // shares_left))  # rounded up
            rest -= counts[-1]
            shares_left -= share
        return counts

    def locate(self, sample: int, seed: int) -> tuple[int, int]:
        """The corpus and the row in it that sample number `sample` of a run is."""
        before, after = self.counts(sample), self.counts(sample + 1)
        part = next(i for i in range(len(before)) if after[i] > before[i])
        rows = self.parts[part]
        epoch, position = divmod(before[part], len(rows))
        # Fewer rounds than 8 leave neighbouring batches alike; adding the epoch to the seed would
        # make epoch 1 of seed 0 equal epoch 0 of seed 1.
        return part, grain.experimental.index_shuffle(
            position, max_index=len(rows) - 1, seed=_key(rows.fingerprint, seed, epoch), rounds=8
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    train: Source
    validation: Source


def prepare(data: config.Data, tokenizer: Tokenizer) -> Prepared:
    """Tokenizes and packs `data.corpus` into `data.cache_dir`, or finds it there.

    Several processes may prepare the same data at once; each finished shard is kept.

    Raises:
      UserError: as `corpora.read` says, or a split without documents.
    """
    cache_dir = epath.Path(data.cache_dir).expanduser()
    mixture = corpora.parse(data.corpus)
    splits: dict[str, list[Rows]] = {'train': [], 'validation': []}
    for corpus, _ in mixture:
        prepared = documents.prepare(corpus, cache_dir, data.validation_fraction)
        for split, rows in splits.items():
            rows.append(_pack(prepared[split], data, tokenizer, cache_dir))
    weights = tuple(weight for _, weight in mixture)
    return Prepared(**{name: Source(tuple(rows), weights) for name, rows in splits.items()})


def from_text(pattern: str, data: config.Data, tokenizer: Tokenizer) -> Source:
    """Rows of every document of a corpus (such as a glob), none held out, packed as `data` says."""
    cache_dir = epath.Path(data.cache_dir).expanduser()
    mixture = corpora.parse(pattern)
    rows = [
        _pack(documents.prepare(corpus, cache_dir, 0.0)['train'], data, tokenizer, cache_dir)
        for corpus, _ in mixture
    ]
    return Source(tuple(rows), tuple(weight for _, weight in mixture))


def train_batches(
    prepared: Prepared,
    *,
    batch_rows: int,
    seed: int,
    first_sample: int = 0,
    host: int | None = None,
    num_hosts: int | None = None,
) -> Iterator[Batch]:
    """Batches without end; this host's rows of each.

    Args:
      batch_rows: B over all hosts.
      first_sample: samples (rows over all hosts) that the run has consumed.
      host: which contiguous slice of each batch to read; jax's process index by default.
    Raises:
      UserError: `num_hosts` does not divide `batch_rows`.
    """
    local = _host_slice(batch_rows, host, num_hosts)

    def batch(step: int) -> Batch:
        start = first_sample + step * batch_rows
        samples = range(start, start + batch_rows)[local]
        located = [prepared.train.locate(sample, seed) for sample in samples]
        return _assemble(prepared.train, located, len(located))

    steps = grain.MapDataset.range(2**62).map(batch)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return iter(steps.to_iter_dataset(options))


def eval_batches(
    source: Source,
    *,
    batch_rows: int,
    num_rows: int = 0,
    host: int | None = None,
    num_hosts: int | None = None,
) -> Iterator[Batch]:
    """The same rows in the same order each time; the last batch is filled up with padding rows.

    Args:
      num_rows: rows in all, spread evenly over each corpus, corpora in proportion to their
        weights; 0 takes every row.
    """
    local = _host_slice(batch_rows, host, num_hosts)
    wanted = source.counts(num_rows) if num_rows else [len(rows) for rows in source.parts]
    located = []
    for part, (rows, count) in enumerate(zip(source.parts, wanted, strict=True)):
        count = min(count, len(rows))
        located += [(part, index * len(rows) // count) for index in range(count)]
    for start in range(0, len(located), batch_rows):
        yield _assemble(
            source, located[start : start + batch_rows][local], local.stop - local.start
        )


def to_global(batch: Batch, sharding: NamedSharding) -> Batch:
    """The hosts' slices as one batch of jax arrays: [B T] sharded so, [B] as its rows are."""
    rows_only = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return Batch(
        *(
            jax.make_array_from_process_local_data(sharding if x.ndim == 2 else rows_only, x)
            for x in batch
        )
    )


def summary(prepared: Prepared) -> list[dict[str, Any]]:
    """What `helios data prepare` prints, a line for each corpus and split."""
    return [
        {
            'corpus': rows.corpus,
            'split': rows.split,
            'weight': float(weight),
            'rows': len(rows),
            'tokens': rows.num_tokens,
            'bytes': rows.num_bytes,
            'fill': rows.num_tokens / (len(rows) * rows.row_length),
            'fingerprint': rows.fingerprint,
            'path': str(rows.directory),
        }
        for source in (prepared.train, prepared.validation)
        for rows, weight in zip(source.parts, source.weights, strict=True)
    ]


def train_tokenizer(corpus: str, vocab_size: int, output: str) -> None:
    """What `helios data tokenizer` does: a BPE of a corpus, written to `output`."""
    if not output.endswith('.json'):
        raise config.UserError(f'output={output!r} must end in .json, to be known as a tokenizer.')
    train_bpe(corpora.texts(corpus), vocab_size, epath.Path(output).expanduser())


def _pack(
    split: documents.Documents, data: config.Data, tokenizer: Tokenizer, cache_dir: epath.Path
) -> Rows:
    packer = packing.Packer(tokenizer, data.row_length, data.packing)
    return Rows(packing.pack(split, packer, cache_dir, data.num_workers))


@functools.lru_cache
def _key(fingerprint: str, seed: int, epoch: int) -> int:
    return int(records.digest(fingerprint, seed, epoch)[:8], 16)


def _host_slice(batch_rows: int, host: int | None, num_hosts: int | None) -> slice:
    host = jax.process_index() if host is None else host
    num_hosts = jax.process_count() if num_hosts is None else num_hosts
    if batch_rows % num_hosts:
        raise config.UserError(
            f'train.batch_rows={batch_rows} must be a multiple of the {num_hosts} hosts.'
        )
    local_rows = batch_rows // num_hosts
    return slice(host * local_rows, (host + 1) * local_rows)


def _assemble(source: Source, located: Sequence[tuple[int, int]], num_rows: int) -> Batch:
    """The located rows and, up to `num_rows`, padding rows."""
    shape = (num_rows, source.row_length)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        # Where a row is one stream, its padding is what comes last, which no token sees.
        positions=np.tile(np.arange(shape[1], dtype=np.int32), (num_rows, 1)),
        loss_mask=np.zeros(shape, np.bool_),
        num_bytes=np.zeros(num_rows, np.int32),
    )
    for row, (part, index) in enumerate(located):
        stored = source.parts[part][index]
        lengths = stored['segment_lengths'].astype(np.int32)
        length = len(stored['tokens'])
        batch.tokens[row, :length] = stored['tokens']
        batch.segment_ids[row, :length] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        starts = np.cumsum(lengths) - lengths
        batch.positions[row, :length] = np.arange(length) - np.repeat(starts, lengths)
        batch.loss_mask[row, :length] = stored.get('loss_mask', True)
        batch.num_bytes[row] = stored['num_bytes']
    return batch
