"""Batches of a corpus: a pure function of data, seed and samples consumed.

Resuming needs one number, and hosts, which each read their slice of a batch, cannot change it.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Int32

from helios_jax import config, paths
from helios_jax.data import corpora, documents, packing, records
from helios_jax.data.bpe import train_bpe
from helios_jax.data.rows import Mixture, Rows
from helios_jax.data.tokenizer import Tokenizer
from helios_jax.errors import UserError, require

log = logging.getLogger(__name__)

Array = Any  # NumPy's on a host, jax's on the mesh


class Batch(NamedTuple):
    """Rows of T tokens. Segment 0 is padding: token 0 and no target."""

    tokens: Int32[Array, 'B T']
    segment_ids: Int32[Array, 'B T']  # number of the segment, from 1 in each row
    positions: Int32[Array, 'B T']  # index in the segment, from 0; of padding, in the row
    loss_mask: Bool[Array, 'B T']  # True: the token counts as a target; False for prompts
    num_bytes: Int32[Array, 'B']  # UTF-8 bytes of the text among the row's targets

    def attention_segments(self, documents_apart: bool) -> Int32[Array, 'B T'] | None:
        """Segment ids that attention keeps to; None for plain causal attention over rows."""
        return self.segment_ids if documents_apart else None


@dataclasses.dataclass(frozen=True)
class Prepared:
    train: Mixture
    validation: Mixture

    @property
    def contents(self) -> dict[str, dict[str, Any]]:
        """Facts about the data that a checkpoint keeps."""
        return {'train': self.train.contents, 'validation': self.validation.contents}


def prepare(data: config.Data, tokenizer: Tokenizer, *, rebuild: bool = False) -> Prepared:
    """Tokenizes and packs `data.corpus` into `data.cache_dir`, or finds it there.

    Several processes may prepare the same data at once; each finished shard is kept.

    Args:
      rebuild: makes all of it again, whatever is there, for files that are damaged.
    Raises:
      UserError: as `corpora.read` says; a split without documents or without text to score; a
        tokenizer that loses text, unless `data` allows it; a cache that cannot be written, or is
        damaged.
    """
    # The smaller split comes first: a tokenizer that loses text is soon refused.
    mixtures = _mixtures(data.corpus, data, tokenizer, ['validation', 'train'], rebuild)
    return Prepared(**mixtures)


def from_text(pattern: str, data: config.Data, tokenizer: Tokenizer) -> Mixture:
    """Packs every document of a corpus (such as a glob) as `data` says; none is held out.

    Raises:
      UserError: as `prepare` says.
    """
    return _mixtures(pattern, data, tokenizer, ['train'], rebuild=False)['train']


def train_batches(
    prepared: Prepared,
    *,
    batch_rows: int,
    seed: int,
    first_sample: int = 0,
    host: int | None = None,
    num_hosts: int | None = None,
) -> Iterator[Batch]:
    """Yields batches without end, this host's rows of each.

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
    mixture: Mixture,
    *,
    batch_rows: int,
    num_rows: int = 0,
    host: int | None = None,
    num_hosts: int | None = None,
) -> Iterator[Batch]:
    """Yields the same rows in the same order each time; padding rows fill up the last batch.

    Args:
      num_rows: rows in all, spread evenly over each corpus, corpora in proportion to their
        weights; 0 takes every row.
    """
    local = _host_slice(batch_rows, host, num_hosts)
    wanted = mixture.counts(num_rows) if num_rows else [len(rows) for rows in mixture.corpora]
    located = []
    for corpus, (rows, count) in enumerate(zip(mixture.corpora, wanted, strict=True)):
        count = min(count, len(rows))
        located += [(corpus, index * len(rows) // count) for index in range(count)]
    for start in range(0, len(located), batch_rows):
        yield _assemble(
            mixture, located[start : start + batch_rows][local], local.stop - local.start
        )


def to_global(batch: Batch, sharding: NamedSharding) -> Batch:
    """Joins the hosts' slices into one batch of jax arrays; `sharding` is that of [B T]."""
    rows_only = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return Batch(
        *(
            jax.make_array_from_process_local_data(sharding if x.ndim == 2 else rows_only, x)
            for x in batch
        )
    )


def summary(prepared: Prepared) -> list[dict[str, Any]]:
    """Returns the rows that `helios data prepare` prints, one for each corpus and split."""
    return [
        {
            'corpus': rows.documents.corpus,
            'split': rows.documents.split,
            'weight': float(weight),
            'rows': len(rows),
            'tokens': rows.num_tokens,
            'bytes': rows.num_bytes,
            'lost_bytes': rows.num_lost_bytes,
            'fill': rows.num_tokens / (len(rows) * rows.row_length),
            'fingerprint': rows.fingerprint,
            'path': str(rows.directory),
        }
        for mixture in (prepared.train, prepared.validation)
        for rows, weight in zip(mixture.corpora, mixture.weights, strict=True)
    ]


def train_tokenizer(corpus: str, vocab_size: int, output: str) -> None:
    """Trains a BPE on a corpus and writes it to `output`, for `helios data tokenizer`."""
    if not output.endswith('.json'):
        raise UserError(f'output={output!r} must end in .json, to be known as a tokenizer.')
    train_bpe(corpora.texts(corpus), vocab_size, epath.Path(output).expanduser())


def _mixtures(
    spec: str, data: config.Data, tokenizer: Tokenizer, splits: Sequence[str], rebuild: bool
) -> dict[str, Mixture]:
    """Prepares the rows of each split, from all corpora."""
    paths.check('data.cache_dir', data.cache_dir)
    cache_dir = epath.Path(data.cache_dir).expanduser()
    packer = packing.Packer(tokenizer, data.row_length, data.packing)
    held_out = data.validation_fraction if 'validation' in splits else 0.0
    mixture = corpora.parse(spec)
    packed: dict[str, list[Rows]] = {name: [] for name in splits}
    with records.writing(cache_dir):
        for corpus, _ in mixture:
            prepared = documents.prepare(corpus, cache_dir, held_out, rebuild)
            for name, rows in packed.items():
                split = prepared[name]
                directory = packing.pack(split, packer, cache_dir, data.num_workers, rebuild)
                rows.append(Rows(directory, split))
                _check_scorable(rows[-1], data, tokenizer)
    weights = tuple(weight for _, weight in mixture)
    return {name: Mixture(tuple(rows), weights) for name, rows in packed.items()}


def _check_scorable(rows: Rows, data: config.Data, tokenizer: Tokenizer) -> None:
    """Refuses a split whose bits per byte would mean nothing."""
    where = f'the {rows.documents.split} split of data.corpus={rows.documents.corpus!r}'
    lost, total = rows.num_lost_bytes, rows.num_lost_bytes + rows.num_bytes
    if lost:
        loss = (
            f'data.tokenizer={tokenizer.name!r} loses {lost / total:.2%} of {where} ({lost:,} of '
            f'{total:,} bytes; {rows.lost_example})'
        )
        require(
            data.allow_lossy_tokenizer,
            f'{loss}, and bits per byte compare only where nothing is lost; choose another, such '
            'as bytes or one of helios data tokenizer, or set data.allow_lossy_tokenizer=True to '
            'score only the bytes that are kept.',
        )
        log.warning('%s; bits per byte count only what is kept.', loss)
    require(
        rows.num_bytes > 0,
        f'{where} has no text to score: every text, completion or answer in it is empty or lost; '
        'give documents with text, or change data.validation_fraction.',
    )


def _host_slice(batch_rows: int, host: int | None, num_hosts: int | None) -> slice:
    host = jax.process_index() if host is None else host
    num_hosts = jax.process_count() if num_hosts is None else num_hosts
    if batch_rows % num_hosts:
        raise UserError(
            f'train.batch_rows={batch_rows} must be a multiple of the {num_hosts} hosts.'
        )
    local_rows = batch_rows // num_hosts
    return slice(host * local_rows, (host + 1) * local_rows)


def _assemble(mixture: Mixture, located: Sequence[tuple[int, int]], num_rows: int) -> Batch:
    """Makes a batch of the located rows and, up to `num_rows`, padding rows."""
    shape = (num_rows, mixture.row_length)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        # Where a row is one stream, its padding is what comes last, which no token sees.
        positions=np.tile(np.arange(shape[1], dtype=np.int32), (num_rows, 1)),
        loss_mask=np.zeros(shape, np.bool_),
        num_bytes=np.zeros(num_rows, np.int32),
    )
    for row, (corpus, index) in enumerate(located):
        stored = mixture.corpora[corpus][index]
        lengths = stored['segment_lengths'].astype(np.int32)
        length = len(stored['tokens'])
        batch.tokens[row, :length] = stored['tokens']
        batch.segment_ids[row, :length] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        starts = np.cumsum(lengths) - lengths
        batch.positions[row, :length] = np.arange(length) - np.repeat(starts, lengths)
        batch.loss_mask[row, :length] = stored.get('loss_mask', True)
        batch.num_bytes[row] = stored['num_bytes']
    return batch
