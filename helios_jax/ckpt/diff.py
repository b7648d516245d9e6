"""Compares two checkpoints: settings, tokenizer, and each weight's difference."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from helios_jax import checkpoint, restoring
from helios_jax.train.run import flat_settings

ITEMS = ('params', 'router', 'ema')  # the items that hold weights; moments are not compared
PIECE = 2**22  # elements that are compared at a time


def settings(a: checkpoint.Opened, b: checkpoint.Opened) -> dict[str, tuple[Any, Any]]:
    """Returns what differs beside weights: settings by dotted name, step, tokenizer, arrays' names.

    Raises:
      UserError: a config that this version refuses.
    """
    first, second = (
        flat_settings({'config': dataclasses.asdict(restoring.saved_config(each))})
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
    """Yields a row for each weight that either has, read and compared in its turn.

    A row has `name`, and `difference`: 'none', 'missing' (in b), 'extra' (in b), 'shape', or
    'values' with the largest `max` |a − b| and the `relative` norm ‖a − b‖ / ‖a‖, in float64.

    Raises:
      DamageError: a file is not what was written.
    """
    for item in ITEMS:
        sides = [checkpoint.StoredItem(x, item) if item in x.items else None for x in (a, b)]
        names = dict.fromkeys(name for side in sides if side for name in side.arrays)
        for name in names:
            row = {'name': f'{item}/{name}'}
            first, second = (side if side and name in side.arrays else None for side in sides)
            if not first or not second:
                yield row | {'difference': 'missing' if first else 'extra'}
            elif first.arrays[name][0] != second.arrays[name][0]:
                shapes = ' and '.join(str(list(side.arrays[name][0])) for side in (first, second))
                yield row | {'difference': 'shape', 'shapes': shapes}
            else:
                yield row | difference(first.read(name), second.read(name))


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Compares two arrays of one shape, whatever their dtypes; NaN equals NaN."""
    largest, squares, whole, same = 0.0, 0.0, 0.0, True
    for start in range(0, a.size, PIECE):
        x, y = (each.reshape(-1)[start : start + PIECE].astype(np.float64) for each in (a, b))
        same = same and np.array_equal(x, y, equal_nan=True)
        apart = np.abs(x - y)
        largest = float(np.maximum(largest, apart.max()))  # a NaN stays
        squares += float(apart @ apart)
        whole += float(x @ x)
    if same:
        return {'difference': 'none'}
    relative = math.sqrt(squares / whole) if whole else math.inf
    return {'difference': 'values', 'max': largest, 'relative': relative}
