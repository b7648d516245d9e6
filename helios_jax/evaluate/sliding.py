"""Perplexity in sliding windows, and bits per byte by position.

The protocol is that of YaRN (2309.00071 §4.2, after 2108.12409): a row scores the `stride` tokens
that follow those of the row before it, and reads as many tokens before them as fit; the first row
scores all of its tokens. Here every row starts with BOS, as rows of training do.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from helios_jax.data.lossy import Encoded
from helios_jax.evaluate.scores import Pair, score, shapes, windows
from helios_jax.restoring import Restored, mesh_of

FIRST_BIN = 64  # positions of the first bin of bits per byte; each one after it ends twice as far


class Bin(NamedTuple):
    """Text at some positions of the first rows, over all documents."""

    start: int
    end: int  # the position after the last one
    bits: float
    bytes: int
    bits_per_byte: float


def perplexity(
    restored: Restored, texts: Sequence[Encoded], length: int, stride: int, batch_tokens: int
) -> dict[str, Any]:
    """Scores every token of the texts once, in rows of at most `length` tokens.

    Args:
      stride: tokens that a row scores, but for a text's first row.
      batch_tokens: tokens at a time, about.
    Returns:
      `perplexity`, `tokens`; `bits_per_byte` and `positions` (a list of `Bin`) of the first rows.
    """
    bos_id = restored.tokenizer.bos_id
    rows: list[Pair] = []
    first: dict[int, int] = {}  # row to text
    for number, text in enumerate(texts):
        first[len(rows)] = number
        rows += list(windows(text.ids.tolist(), bos_id, length, stride))
    nats, tokens = 0.0, 0
    bits, num_bytes = np.zeros((2, length))  # by position
    mesh = mesh_of(restored.variables)
    for shape in shapes([len(a) + len(b) for a, b in rows], mesh, batch_tokens):
        scored = score(restored, [rows[i] for i in shape.indices], shape)
        for index, of_row in zip(shape.indices, scored, strict=True):
            nats += float(of_row.nats.sum(dtype=np.float64))
            tokens += len(of_row.nats)
            if index in first:
                count = len(of_row.nats)
                bits[1 : 1 + count] += of_row.nats / math.log(2)
                num_bytes[1 : 1 + count] += texts[first[index]].num_bytes[:count]
    return {
        'perplexity': math.exp(min(nats / tokens, 700)),
        'tokens': tokens,
        'bits_per_byte': float(bits.sum() / num_bytes.sum()),
        'positions': [one._asdict() for one in bins(bits, num_bytes)],
    }


def bins(bits: np.ndarray, num_bytes: np.ndarray) -> list[Bin]:
    """Sums up bits and bytes by position; bins end at powers of two and at the last position."""
    made, start = [], 0
    while start < len(bits):
        end = min(max(FIRST_BIN, 2 * start), len(bits))
        some, text = float(bits[start:end].sum()), int(num_bytes[start:end].sum())
        made.append(Bin(start, end, some, text, some / text if text else math.nan))
        start = end
    return made
