"""Values of a config.json, each refused by name if it is not of the type that it must be."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from helios_jax.errors import UserError, require

LARGEST_BYTES = 2**26  # of a JSON file; an index of 100,000 tensors has a tenth of it
Values = Mapping[str, Any]


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: no such file, one that is too large, or no JSON object.
    """
    require(path.is_file(), f'{path}: no such file.')
    size = path.stat().length
    require(size <= LARGEST_BYTES, f'{path} has {size} bytes, more than {LARGEST_BYTES}.')
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is no JSON ({str(error)[:80]}).') from None
    require(isinstance(values, dict), f'{path} must hold a JSON object.')
    return values


def number(values: Values, name: str, default: float | int | None = None) -> float:
    """Returns a finite number; the default where the value is absent or null."""
    value = values.get(name)
    value = default if value is None else value
    # A NaN is in no range; a bool is no number here.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    raise UserError(f'config.json: {name}={value!r:.80} must be a finite number.')


def whole(values: Values, name: str, default: int | None = None) -> int:
    """Returns a whole number of 0 or more."""
    value = number(values, name, default)
    require(
        value == int(value) and 0 <= value < 2**31,
        f'config.json: {name}={values.get(name)!r:.80} must be a whole number of 0 or more.',
    )
    return int(value)


def flag(values: Values, name: str, default: bool = False) -> bool:
    value = values.get(name)
    value = default if value is None else value
    require(isinstance(value, bool), f'config.json: {name}={value!r:.80} must be true or false.')
    return bool(value)


def entries(values: Values, name: str, kind: type) -> list[Any]:
    """Returns a list whose entries are of one type; an empty one where the value is absent."""
    value = values.get(name)
    value = [] if value is None else value
    require(
        isinstance(value, list) and all(type(entry) is kind for entry in value),
        f'config.json: {name}={value!r:.80} must be a list of {kind.__name__}.',
    )
    return list(value)


def require_absent(values: Values, name: str, *harmless: Any) -> None:
    """Refuses a value that changes the model in a way that we lack."""
    value = values.get(name)
    require(
        value is None or value in harmless,
        f'config.json: {name}={value!r:.80} is not supported; it must be '
        f'{" or ".join(map(repr, harmless)) or "absent"}.',
    )
