"""Packed rows of several corpora, and the order in which a run samples them.

Sample i belongs to a corpus and to a row of it by arithmetic alone: corpora take turns in
proportion to their weights, and each goes through its rows in a new random order every epoch.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import grain
import tensorflow_datasets as tfds
from etils import epath

from helios_jax.data import documents, packing, records


class Rows:
    """One packed corpus split, row by row.

    Attributes:
      documents: what was packed.
      fingerprint: digest of documents, tokenizer, row length, packing, split and format.
      row_length: T, tokens.
      num_tokens: tokens without padding.
      num_bytes: UTF-8 bytes of text that is a target and that decoding gives back.
      num_lost_bytes: UTF-8 bytes of text that the tokenizer lost.
      lost_example: an example of lost text, for a message.
      chat_template: fingerprint of the template that rendered conversations; '' without any.
    """

    def __init__(self, directory: epath.Path, split: documents.Documents):
        info = tfds.builder_from_directory(directory).info
        self.directory = directory
        self.documents = split
        self.fingerprint: str = info.metadata['fingerprint']
        self.row_length: int = info.metadata['row_length']
        self.num_tokens: int = info.metadata['num_tokens']
        self.num_bytes: int = info.metadata['num_bytes']
        self.num_lost_bytes: int = info.metadata['num_lost_bytes']
        self.lost_example: str = info.metadata['lost_example']
        self.chat_template: str = info.metadata.get('chat_template', '')
        self._records = records.Records(info, packing.SPLIT)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a stored row: tokens, segment_lengths, num_bytes and, with prompts, loss_mask."""
        return self._records[index]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of several corpora, and the share of samples that each gives; shares add up to 1."""

    corpora: tuple[Rows, ...]
    weights: tuple[Fraction, ...]

    def __len__(self) -> int:
        return sum(map(len, self.corpora))

    @property
    def row_length(self) -> int:
        return self.corpora[0].row_length

    @property
    def num_tokens(self) -> int:
        return sum(rows.num_tokens for rows in self.corpora)

    @property
    def num_bytes(self) -> int:
        return sum(rows.num_bytes for rows in self.corpora)

    @property
    def lost_fraction(self) -> float:
        """Share of the text's bytes that the tokenizer lost; `num_bytes` are the rest."""
        lost = sum(rows.num_lost_bytes for rows in self.corpora)
        return lost / (lost + self.num_bytes) if lost else 0.0

    @functools.cached_property
    def fingerprint(self) -> str:
        pairs = zip(self.corpora, self.weights, strict=True)
        return records.digest([[rows.fingerprint, str(weight)] for rows, weight in pairs])

    @property
    def chat_template(self) -> str:
        """Fingerprint of the template that rendered conversations; '' without any."""
        return next((rows.chat_template for rows in self.corpora if rows.chat_template), '')

    @property
    def contents(self) -> dict[str, Any]:
        """Facts about the data that a checkpoint keeps, for `changes` to compare."""
        texts = [rows.documents for rows in self.corpora]
        weights = map(str, self.weights)
        return {
            'rows': self.fingerprint,
            'text': records.digest([*zip((d.fingerprint for d in texts), weights, strict=True)]),
            'documents': sum(d.num_documents for d in texts),
            'bytes': sum(d.num_bytes for d in texts),
        } | ({'chat_template': self.chat_template} if self.chat_template else {})

    @functools.cached_property
    def _shares(self) -> list[int]:
        """The weights as integers: exact, and faster than fractions."""
        denominator = math.lcm(*(weight.denominator for weight in self.weights))
        return [int(weight * denominator) for weight in self.weights]

    def counts(self, num_samples: int) -> list[int]:
        """Counts the samples that each corpus gives of the first `num_samples`: its share, rounded.

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
        """Finds the corpus of sample number `sample` of a run, and its row in that corpus."""
        before, after = self.counts(sample), self.counts(sample + 1)
        corpus = next(i for i in range(len(before)) if after[i] > before[i])
        rows = self.corpora[corpus]
        epoch, position = divmod(before[corpus], len(rows))
        # Fewer rounds than 8 leave neighbouring batches alike; adding the epoch to the seed would
        # make epoch 1 of seed 0 equal epoch 0 of seed 1.
        return corpus, grain.experimental.index_shuffle(
            position, max_index=len(rows) - 1, seed=_key(rows.fingerprint, seed, epoch), rounds=8
        )


def changes(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """Describes how two splits' `Mixture.contents` differ; '' if their text is the same."""
    if saved['text'] == now['text']:
        alike = saved.get('chat_template') == now.get('chat_template')
        return '' if alike else 'its conversations are rendered by another chat template'
    more = now['documents'] - saved['documents']
    if more:
        count = f'{abs(more):,} documents {"more" if more > 0 else "fewer"}'
    else:
        count = f'{now["documents"]:,} documents as before, not all of them the same'
    return f'{count}, {now["bytes"]:,} bytes instead of {saved["bytes"]:,}'


@functools.lru_cache
def _key(fingerprint: str, seed: int, epoch: int) -> int:
    return int(records.digest(fingerprint, seed, epoch)[:8], 16)
