"""Bits per byte of models that anyone has, to set a language model's beside."""

import gzip
import itertools
from typing import Any

import numpy as np

from helios_jax.data.pipeline import Source
from helios_jax.data.tokenizer import ByteTokenizer, Tokenizer

BASELINE_BYTES = 2**25  # of text that is compressed


def bits_per_byte(source: Source, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of two models that anyone has: byte frequencies, and gzip at level 9.

    Both see the text that is a target, decoded; of a long text the first 32 MiB.
    """
    text = bytearray()
    for row in itertools.chain.from_iterable(source.parts):
        if len(text) >= BASELINE_BYTES:
            break
        text += _text(row, tokenizer)
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    shares = counts[counts > 0] / len(text)
    return {
        'order0_bits_per_byte': float(-(shares * np.log2(shares)).sum()),
        'gzip_bits_per_byte': 8 * len(gzip.compress(bytes(text), 9)) / len(text),
    }


def _text(row: dict[str, Any], tokenizer: Tokenizer) -> bytes:
    """The text among a row's targets, exact for the bytes tokenizer."""
    ids = row['tokens'][row.get('loss_mask', np.ones_like(row['tokens'])).astype(bool)]
    if isinstance(tokenizer, ByteTokenizer):
        return ids[(ids != tokenizer.bos_id) & (ids != tokenizer.eos_id)].astype(np.uint8).tobytes()
    return tokenizer.decode(ids.tolist()).encode()
