"""Reads where the time of a GPU's profile goes: its kernels by kind, and collectives that wait.

A collective is exposed as long as no other kernel of its card runs beside it.
"""

import collections
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

# NCCL's kernels, XLA's own for small sums, and copies from card to card.
COLLECTIVE = r'nccl|all_?reduce_?kernel|memcpyp2p'
# First match wins; XLA names its own kernels after what they fuse.
KINDS = (
    ('collective', COLLECTIVE),
    ('attention', r'fmha|sdpa|flash|cudnn.*attention'),
    ('matmul', r'gemm|nvjet|cutlass|xmma|cublas|dot'),
    ('copy', r'memcpy|memset|copy|transpose'),
    ('reduction', r'reduce'),
    ('fusion', r'fusion|loop_|wrapped'),
)
COLLECTIVES = (
    ('all_gather', r'all_?gather'),
    ('reduce_scatter', r'reduce_?scatter'),
    ('all_reduce', r'all_?reduce'),
    ('send', r'send|memcpyp2p'),
)


class Event(NamedTuple):
    """A kernel or a copy, in nanoseconds."""

    name: str
    start: float
    end: float
    # The program, and the instruction of its text, that it ran for; '' where that is not recorded.
    module: str = ''
    instruction: str = ''


Spans = list[tuple[float, float]]


def card_events(directory: Path) -> list[list[Event]]:
    """Lists what each card did, by the newest profile below `directory`."""
    profiles = sorted(directory.rglob('*.xplane.pb'))
    assert profiles, f'no profile below {directory}'
    return [
        [
            _event(event)
            for line in plane.lines
            if line.name.startswith('Stream')
            for event in line.events
        ]
        for plane in jax.profiler.ProfileData.from_file(str(profiles[-1])).planes
        if '/device:' in plane.name
    ]


def _event(event: Any) -> Event:
    stats = {name: str(value) for name, value in event.stats if name in ('hlo_module', 'hlo_op')}
    end = event.start_ns + event.duration_ns
    return Event(
        event.name, event.start_ns, end, stats.get('hlo_module', ''), stats.get('hlo_op', '')
    )


def kernel_seconds(directory: Path) -> dict[str, float]:
    """Adds up the seconds of each kernel in the newest profile below `directory`, of all cards."""
    totals: dict[str, float] = collections.defaultdict(float)
    for event in (event for events in card_events(directory) for event in events):
        totals[event.name] += event.end - event.start
    longest_first = sorted(totals.items(), key=lambda item: -item[1])
    return {name: nanoseconds / 1e9 for name, nanoseconds in longest_first}


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """Sums the seconds of kernels by their kind."""
    totals: dict[str, float] = {}
    for name, seconds in kernels.items():
        kind = kind_of(name, KINDS)
        totals[kind] = totals.get(kind, 0.0) + seconds
    return totals


def kind_of(name: str, kinds: Iterable[tuple[str, str]]) -> str:
    """Finds the first kind whose pattern a kernel's name has; 'other' if there is none."""
    return next((kind for kind, pattern in kinds if re.search(pattern, name.lower())), 'other')


class Waiting(NamedTuple):
    """Seconds of one card; each collective's are (all, exposed)."""

    collectives: dict[str, tuple[float, float]]
    exposed: float  # of all collectives together
    idle: float  # between the first event and the last, while nothing ran
    span: float


def waiting(events: list[Event]) -> Waiting:
    """Finds what a card waited for."""
    spans: dict[str, Spans] = collections.defaultdict(list)
    for name, start, end, *_ in events:
        sends = re.search(COLLECTIVE, name.lower())
        spans[kind_of(name, COLLECTIVES) if sends else ''].append((start, end))
    compute = union(spans.pop('', []))
    alone = lambda some: (length(union(some + compute)) - length(compute)) / 1e9
    every = [span for some in spans.values() for span in some]
    busy = union(every + compute)
    span = (busy[-1][1] - busy[0][0]) / 1e9 if busy else 0.0
    return Waiting(
        {kind: (length(union(some)) / 1e9, alone(some)) for kind, some in spans.items()},
        alone(every),
        span - length(busy) / 1e9,
        span,
    )


def union(spans: Spans) -> Spans:
    """Joins spans that meet; returns them in order."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def length(spans: Spans) -> float:
    return sum((end - start for start, end in spans), 0.0)
