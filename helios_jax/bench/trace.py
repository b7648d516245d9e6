"""Reads where the time of a GPU's profile goes: seconds of its kernels, by kind."""

import collections
import re
from pathlib import Path

import jax

# First match wins; XLA names its own kernels after what they fuse.
KINDS = (
    ('attention', r'fmha|sdpa|flash|cudnn.*attention'),
    ('matmul', r'gemm|nvjet|cutlass|xmma|cublas|dot'),
    ('copy', r'memcpy|memset|copy|transpose'),
    ('reduction', r'reduce'),
    ('fusion', r'fusion|loop_|wrapped'),
)


def kernel_seconds(directory: Path) -> dict[str, float]:
    """Adds up the device seconds of each kernel in the newest profile below `directory`."""
    profiles = sorted(directory.rglob('*.xplane.pb'))
    assert profiles, f'no profile below {directory}'
    totals: dict[str, float] = collections.defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(profiles[-1])).planes:
        if '/device:' not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith('Stream'):
                for event in line.events:
                    totals[event.name] += event.duration_ns
    longest_first = sorted(totals.items(), key=lambda item: -item[1])
    return {name: nanoseconds / 1e9 for name, nanoseconds in longest_first}


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """Sums the seconds of kernels by their kind."""
    totals: dict[str, float] = {}
    for name, seconds in kernels.items():
        kind = next((k for k, pattern in KINDS if re.search(pattern, name.lower())), 'other')
        totals[kind] = totals.get(kind, 0.0) + seconds
    return totals
