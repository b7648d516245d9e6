"""Compares two checkpoints: settings, tokenizer, and each weight's difference."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from helios_jax import checkpoint, config, restoring

ITEMS = ('params', 'router', 'ema')  # the items that hold weights; moments are not compared
PIECE = 2**22  # elements that are compared at a time


def settings(a: checkpoint.Opened, b: checkpoint.Opened) -> dict[str, tuple[Any, Any]]:
    """Returns what differs beside weights: settings by dotted name, step, tokenizer, arrays' names.

    Raises:
      UserError: a config that this version refuses.
    """
    first, second = (
        config.settings(restoring.saved_config(each), 'config.')
        | {
            'step': each.step,
            'tokenizer': each.metadata.get('tokenizer'),
            'tokenizer_files': each.metadata.get('tokenizer_files'),
            'items': list(each.items),
        }
        for each in (a, b)
    )
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


def weights(a: checkpoint.Opened, b: checkpoint.Opened) -> Iterator[dict[str, Any]]:
    """Yields a row for each weight of the items that both have, read and compared in its turn.

    A row has `name`, and `difference`: 'none', 'missing' (in b), 'extra' (in b), 'shape', or
    'values' with the largest `max` |a − b| and the `relative` norm ‖a − b‖ / ‖a‖, in float64.

    Raises:
      DamageError: a file is not what was written.
    """
    for item in ITEMS:
        if item not in a.items or item not in b.items:
            continue
        first, second = (checkpoint.StoredItem(each, item) for each in (a, b))
        for name in {**first.arrays, **second.arrays}:
            row = {'name': f'{item}/{name}'}
            shapes = [str(list(x.arrays[name][0])) for x in (first, second) if name in x.arrays]
            if len(shapes) == 1:
                yield row | {'difference': 'missing' if name in first.arrays else 'extra'}
            elif shapes[0] != shapes[1]:
                yield row | {'difference': 'shape', 'shapes': ' and '.join(shapes)}
            else:
                yield row | difference(first.read(name), second.read(name))


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Compares two arrays of one shape, whatever their dtypes; NaN equals NaN."""
    largest, squares, whole, same = 0.0, 0.0, 0.0, True
    for start in range(0, a.size, PIECE):
        x, y = (each.reshape(-1)[start : start + PIECE].astype(np.float64) for each in (a, b))
        same = same and np.array_equal(x, y, equal_nan=True)
        with np.errstate(invalid='ignore'):  # ∞ − ∞
            apart = np.abs(x - y)
        largest = float(np.maximum(largest, apart.max()))  # a NaN stays
        squares += float(apart @ apart)
        whole += float(x @ x)
    if same:
        return {'difference': 'none'}
    relative = math.sqrt(squares / whole) if whole else math.inf
    return {'difference': 'values', 'max': largest, 'relative': relative}
