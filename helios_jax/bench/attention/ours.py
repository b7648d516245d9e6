"""Makes our attention kernels a candidate, and counts how often their regions run."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from helios_jax.bench.attention.problem import Candidate, Problem, frequencies
from helios_jax.kernels.attention import Setting, Tokens, tpu
from helios_jax.kernels.attention.tpu import blocks, work
from helios_jax.kernels.attention.tpu.blocks import Shape
from helios_jax.kernels.attention.tpu.tiles import MARKS
from helios_jax.kernels.attention.tpu.work import Blocks
from helios_jax.plan.compiler.timing import FLOAT, HALF, Visits, changes, tally

Options = dict[str, Any]


def variants(problem: Problem, which: str, target: str) -> list[Options]:
    """Lists the one shape that the kernels take for the problem."""
    at = problem.head_dim, problem.length
    return [{'shape': blocks.shape(target, *at, wide=False, backward=which == 'backward')}]


def candidate(problem: Problem, options: Options) -> Candidate:
    """Makes our attention with the blocks of a shape."""
    group, T = problem.heads // problem.kv_heads, problem.length
    chosen = blocks.fit(Shape(*options['shape']), group, T, T)
    turns = jnp.asarray(frequencies(problem))

    def attend(q: Array, k: Array, v: Array, positions: Array, segments: Array) -> Array:
        return tpu.attention(
            q,
            k,
            v,
            Tokens(positions, segments if problem.documents > 1 else None),
            Setting(turns, window=problem.window),
            blocks=(chosen, chosen),
        )

    marks = np.stack([problem.segment_ids, problem.positions], axis=1).astype(np.float32)
    listed = work.make(marks, marks, chosen, problem.window, ordered=True)
    visits = {
        'helios_attention_forward': forward_visits(problem, chosen, listed),
        'helios_attention_backward': backward_visits(problem, chosen, listed),
    }
    return Candidate(attend, 'btnh', visits)


def forward_visits(problem: Problem, sizes: Blocks, listed: work.Work) -> Visits:
    """Counts visits of the forward kernel, which has no last_k."""
    runs, moved = count_items(problem, sizes, listed, query_arrays=2, tables=0xFFFF)
    del runs['last_k']
    return tally(repeat(runs, problem), np.tile(moved, problem.kv_heads), 1)


def backward_visits(problem: Problem, sizes: Blocks, listed: work.Work) -> Visits:
    """Counts visits of the backward kernel, which has no start and writes dk and dv."""
    runs, moved = count_items(problem, sizes, listed, query_arrays=4, tables=~0xFFFF)
    del runs['start']
    written = np.asarray(listed.items.writes)
    moved = moved + 2 * sizes.k * problem.head_dim * HALF * changes(written)
    return tally(repeat(runs, problem), np.tile(moved, problem.kv_heads), 1)


def repeat(runs: dict[str, np.ndarray], problem: Problem) -> dict[str, np.ndarray]:
    """Repeats one key head's counts for every key head."""
    return {name: np.tile(count, problem.kv_heads) for name, count in runs.items()}


def count_items(
    problem: Problem, sizes: Blocks, listed: work.Work, query_arrays: int, tables: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Counts, for one key head's work items, how often each region runs and the bytes copied.

    Args:
      query_arrays: arrays of H values a query that an item reads or writes.
      tables: masks the half of `Items.keys` that the tables of keys follow.
    """
    items = work.Items(*map(np.asarray, listed.items))
    strips, queries, keys = items.strips, items.queries, items.keys
    at = work.spans(strips)
    whole = at.mixed - at.full
    halves = [1 << i for i in reversed(range(sizes.run.bit_length() - 1))]
    runs = {
        'first_q': strips & work.FIRST_Q > 0,
        'start': np.arange(len(strips)) == 0,
        'first_k': strips & work.FIRST_K > 0,
        'run': whole // sizes.run,
        **{f'run/{sizes.run // size}': whole // size % 2 for size in halves},
        'masked': at.end - at.first - whole,
        'last_q': strips & work.LAST_Q > 0,
        'last_k': strips & work.LAST_K > 0,
    }
    G, H = problem.heads // problem.kv_heads, problem.head_dim
    rows = changes(queries)
    moved = rows * sizes.q * (G * (query_arrays * H * HALF + FLOAT) + (H + MARKS) * FLOAT)
    moved += changes(queries >> 16, keys & 0xFFFF) * 2 * sizes.k * H * HALF
    moved += changes(queries >> 16, keys & tables) * sizes.k * (H + MARKS) * FLOAT
    return {name: np.asarray(x, np.int64) for name, x in runs.items()}, moved
