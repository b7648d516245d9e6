"""Errors in the user's input, said in one line: value, constraint, fix."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """The user's input cannot be used; the message names the value, the constraint and the fix."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the closest of `names`; '' if none is close or it is one."""
    names = list(names)
    if name in names:  # messages are written before it is known that they are needed
        return ''
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f' Did you mean {close[0]!r}?' if close else ''


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def within_int32(name: str, value: int) -> None:
    """Refuses a number beyond int32, in which JAX counts."""
    require(
        -(2**31) <= value < 2**31, f'{name}={value} must lie between -2147483648 and 2147483647.'
    )


def one_of(field: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    require(
        value in choices,
        f'{field}={value!r} is not one of {", ".join(map(repr, choices))}.'
        f'{nearest(value, choices)}',
    )


def positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f'{section}.{name}={value} must be greater than 0.')


def at_least_zero(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f'{section}.{name}={value} must be 0 or more.')


def fraction(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f'{section}.{name}={value} must lie between 0 and 1.')
