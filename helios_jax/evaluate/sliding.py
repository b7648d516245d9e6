"""Perplexity in sliding windows, and bits per byte by position.

The protocol is that of YaRN (2309.00071 §4.2, after 2108.12409): a row scores the `stride` tokens
that follow those of the row before it, and reads as many tokens before them as fit; the first row
scores all of its tokens. Here every row starts with BOS, as rows of training do.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from helios_jax.data.lossy import Encoded
from helios_jax.evaluate.responses import Responses, digest
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
    restored: Restored,
    texts: Sequence[Encoded],
    length: int,
    stride: int,
    batch_tokens: int,
    known: Responses | None = None,
) -> dict[str, Any]:
    """Scores every token of the texts once, in rows of at most `length` tokens.

    Args:
      stride: tokens that a row scores, but for a text's first row.
      batch_tokens: tokens at a time, about.
      known: scores that are there already, and where new ones go.
    Returns:
      `perplexity`, `sliding_bits_per_byte`, `tokens`, of all rows; `bits_per_byte` and `positions`
      (a list of `Bin`) of the first rows.
    """
    bos_id = restored.tokenizer.bos_id
    rows: list[Pair] = []
    first: dict[int, int] = {}  # row to text
    for number, text in enumerate(texts):
        first[len(rows)] = number
        rows += list(windows(text.ids.tolist(), bos_id, length, stride))
    rope = dataclasses.asdict(restored.model.model.rope)
    keys = [digest('row', rope, *row, index in first) for index, row in enumerate(rows)]
    known = Responses(None, model='') if known is None else known
    mesh = mesh_of(restored.variables)
    for shape in shapes([len(a) + len(b) for a, b in rows], mesh, batch_tokens):
        if all(keys[i] in known for i in shape.indices):
            continue
        scored = score(restored, [rows[i] for i in shape.indices], shape)
        some = zip(shape.indices, scored, strict=True)
        known.add({keys[i]: _sums(x.nats, length if i in first else 0) for i, x in some})
    nats = math.fsum(known[key][0] for key in keys)
    bits = np.sum([known[keys[index]][1] for index in first], axis=0)
    num_bytes = np.zeros(length, np.int64)
    for index, number in first.items():
        count = len(rows[index][1])
        num_bytes[1 : 1 + count] += texts[number].num_bytes[:count]
    tokens = sum(len(after) for _, after in rows)
    text_bytes = sum(int(text.num_bytes.sum(dtype=np.int64)) for text in texts)
    return {
        'perplexity': math.exp(min(nats / tokens, 700)),
        'sliding_bits_per_byte': nats / math.log(2) / text_bytes,
        'tokens': tokens,
        'bits_per_byte': float(bits.sum() / num_bytes.sum()),
        'positions': [one._asdict() for one in bins(bits, num_bytes)],
    }


def _sums(nats: np.ndarray, length: int) -> tuple[float, list[float]]:
    """Sums up a row's nats, and its bits by bin of a first row's `length` positions."""
    bits = np.zeros(length)
    bits[1 : 1 + len(nats)] = nats[: max(0, length - 1)] / math.log(2)
    by_bin = [float(bits[start:end].sum()) for start, end in edges(length)]
    return float(nats.sum(dtype=np.float64)), by_bin


def edges(length: int) -> list[tuple[int, int]]:
    """Lists where bins start and end: at powers of two and at the last position."""
    made, start = [], 0
    while start < length:
        made.append((start, min(max(FIRST_BIN, 2 * start), length)))
        start = made[-1][1]
    return made


def bins(bits: np.ndarray, num_bytes: np.ndarray) -> list[Bin]:
    """Puts the bits of each bin and the bytes of each position together."""
    made = []
    for some, (start, end) in zip(bits.tolist(), edges(len(num_bytes)), strict=True):
        text = int(num_bytes[start:end].sum())
        made.append(Bin(start, end, some, text, some / text if text else math.nan))
    return made
