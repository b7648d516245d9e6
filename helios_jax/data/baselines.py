"""Bits per byte of models that anyone has, to compare a language model's with."""

import gzip
from collections.abc import Iterator

import numpy as np

from helios_jax.data import encoding
from helios_jax.data.rows import Mixture
from helios_jax.data.tokenizer import Tokenizer

BASELINE_BYTES = 2**25  # bytes of text that are compressed


def bits_per_byte(mixture: Mixture, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of two models that anyone has: byte frequencies, and gzip at level 9.

    Both see the bytes that a language model is scored on: the documents without prompts, and
    without what the tokenizer loses. Of a long text they see the first 32 MiB.
    """
    text = bytearray()
    for scored in _scored(mixture, tokenizer):
        text += scored
        if len(text) >= BASELINE_BYTES:
            break
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(text)
    return {
        'order0_bits_per_byte': float(-(shares * np.log2(shares)).sum()),
        'gzip_bits_per_byte': 8 * len(gzip.compress(bytes(text), 9)) / len(text),
    }


def _scored(mixture: Mixture, tokenizer: Tokenizer) -> Iterator[bytes]:
    for rows in mixture.corpora:
        for shard in rows.documents.shards():
            for document in shard:
                if rows.num_lost_bytes or document.messages:
                    for _, encoded in encoding.scored(tokenizer, document):
                        yield encoded.kept.encode()
                else:
                    yield document.text.encode()
