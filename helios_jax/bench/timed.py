"""Times work on a GPU in windows that take turns: the clock follows the card's power and heat."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

SECONDS = 0.1  # of a window
WINDOWS = 5


class Timed(NamedTuple):
    """Something to time: `start` begins it, `finish` waits for all that were begun."""

    start: Callable[[], Any]
    finish: Callable[[], Any]


def timed(function: Callable[..., Any], arguments: Sequence[Any]) -> Timed:
    """Makes a run of a jitted or compiled function."""
    last: list[Any] = []

    def start() -> None:
        last[:] = [function(*arguments)]

    return Timed(start, lambda: jax.block_until_ready(last))


def take_turns(runs: dict[Any, Timed]) -> dict[Any, float]:
    """Times runs in windows that take turns; the median of each run's seconds."""
    calls = {}
    for key, run in runs.items():
        run.start(), run.finish()  # the first one compiles
        begin = time.perf_counter()
        run.start(), run.finish()
        calls[key] = max(2, round(SECONDS / (time.perf_counter() - begin)))
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    for window in range(WINDOWS + 1):
        for key, run in runs.items():
            begin = time.perf_counter()
            for _ in range(calls[key]):
                run.start()
            run.finish()
            if window:  # the first warms up
                seconds[key].append((time.perf_counter() - begin) / calls[key])
    return {key: statistics.median(times) for key, times in seconds.items()}
