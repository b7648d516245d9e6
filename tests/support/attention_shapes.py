"""Problems that the tests of several implementations share, and what their masks leave."""

import numpy as np

from helios_jax.bench.attention.problem import Problem

SMALL = {'heads': 6, 'kv_heads': 2, 'head_dim': 128}
PROBLEMS = [
    Problem(4096, **SMALL),
    Problem(4096, **SMALL, batch=2, window=1500),
    Problem(4096, **SMALL, batch=3, documents=9),
    Problem(2048, **SMALL, documents=2),
]


def visible(problem: Problem) -> np.ndarray:
    """Which keys each query sees, [B T T]."""
    at = np.arange(problem.length)
    ids = problem.segment_ids
    seen = (ids[:, :, None] == ids[:, None]) & (at[:, None] >= at)
    return seen & (at[:, None] - at < (problem.window or problem.length))


def blocks(seen: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of [T T] have any, and which have all."""
    cut = seen.reshape(len(seen) // size, size, -1, size)
    return cut.any((1, 3)), cut.all((1, 3))


def total(visits, name: str) -> float:
    """How often the body runs in all steps together."""
    return sum(step.number * step.runs[name] for step in visits.steps)
