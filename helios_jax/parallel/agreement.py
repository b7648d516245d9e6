"""Exchanges values, facts and errors among the processes of a run before they compute.

Nothing here depends on a config, so that configs can be compared before anything is compiled from
them. Every process must call each of these functions, in the same order.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from helios_jax.errors import UserError

NAMED = 3  # differences that a message lists


def gather(value: Any) -> list[Any]:
    """Gathers every process's value, which JSON can hold, by process index."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """Sends process 0's value, which JSON can hold, to every process."""
    if jax.process_count() == 1:
        return value
    return gather(value if jax.process_index() == 0 else None)[0]


@contextlib.contextmanager
def together() -> Iterator[dict[str, Any]]:
    """Lets all processes leave a block, or none of them.

    The block may do things that fail in one process alone, such as reading a file; it must not
    communicate. It fills the dictionary with facts that have to be equal everywhere.

    Raises:
      UserError: in every process, where one of them failed or a fact differs; names the process,
        its host, and the facts.
    """
    facts: dict[str, Any] = {}
    failure: Exception | None = None
    try:
        yield facts
    except Exception as error:
        failure = error
    message = failure and f'{type(failure).__name__}: {failure}'
    if isinstance(failure, UserError):
        message = str(failure)
    told = gather({'host': socket.gethostname(), 'error': message or '', 'facts': facts})
    if failure is not None:
        raise failure
    for index, other in enumerate(told):
        if other['error']:
            raise UserError(f'process {index} on {other["host"]}: {other["error"]}')
    for index, other in enumerate(told):
        if differences := _differences(told[0]['facts'], other['facts']):
            raise UserError(
                f'process {index} on {other["host"]} differs from process 0 on {told[0]["host"]}: '
                f'{differences}; start every process with the same settings, files and packages.'
            )


def _differences(first: dict[str, Any], other: dict[str, Any]) -> str:
    names = sorted({*first, *other})
    wrong = [name for name in names if first.get(name) != other.get(name)]
    listed = [f'{name} is {other.get(name)!r} and not {first.get(name)!r}' for name in wrong]
    rest = len(listed) - NAMED
    return ', '.join(listed[:NAMED]) + (f', and {rest} more' if rest > 0 else '')
