"""Makes our attention kernels a candidate."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from helios_jax.bench.attention.problem import Candidate, Problem, frequencies
from helios_jax.kernels.attention import Setting, Tokens, tpu
from helios_jax.kernels.attention.tpu import blocks
from helios_jax.kernels.attention.tpu.blocks import Shape
from helios_jax.plan.compiler import attention

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

    found = {
        name: attention.visits(
            problem.segment_ids, problem.positions,
            heads=(problem.kv_heads, group, problem.head_dim), window=problem.window,
            sizes=chosen, backward=name == attention.BACKWARD,
        )
        for name in (attention.FORWARD, attention.BACKWARD)
    }  # fmt: skip
    return Candidate(attend, 'btnh', found)
