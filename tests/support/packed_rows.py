"""Rows packed with documents of known lengths."""

from collections.abc import Sequence

import numpy as np


def packed_rows(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids, [B T] each, of rows of documents with these lengths, in tokens.

    Documents are numbered from 1 in each row, and their positions start at 0. Padding has position
    and id 0. What does not fit into the row is cut.
    """
    positions = np.zeros((len(rows), length), np.int32)
    ids = np.zeros_like(positions)
    for row, documents in enumerate(rows):
        tokens = [(at, n) for n, size in enumerate(documents, start=1) for at in range(size)]
        for column, token in enumerate(tokens[:length]):
            positions[row, column], ids[row, column] = token
    return positions, ids
