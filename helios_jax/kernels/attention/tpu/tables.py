"""Tables of the positions and segments of queries and keys, which the kernels read."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from helios_jax.kernels.attention.arguments import Tokens
from helios_jax.kernels.attention.tpu import work
from helios_jax.kernels.attention.tpu.layout import pad
from helios_jax.kernels.attention.tpu.specs import MARKS
from helios_jax.kernels.attention.tpu.work import Blocks


def mark(tokens: Tokens, T: int, S: int, blocks: Blocks) -> tuple[Any, Any]:
    """Stacks segments and positions of queries and of keys: float32 [B 2 T or S], padded.

    In plain rows they are NumPy: the index alone says who sees whom, the list of work is then a
    constant, and the positions of padding at the end do no harm.
    """
    B = len(tokens.positions)
    if tokens.plain:
        queries, keys = np.arange(T + -T % blocks.q), np.arange(S + -S % blocks.k)
        return (
            np.stack([np.where(queries < T, 1, work.NOBODY), queries])[None].repeat(B, 0),
            np.stack([keys < S, np.where(keys < S, keys, work.FAR)])[None].repeat(B, 0),
        )
    segments = tokens.ids_of_queries
    segments = jnp.where(segments > 0, segments, work.NOBODY)

    def stack(segments: Array, positions: Array, block: int, nobody: float, far: float) -> Array:
        padded = pad(segments, block, nobody), pad(positions, block, far)
        return jnp.stack([x.astype(jnp.float32) for x in padded], axis=1)

    return (
        stack(segments, tokens.positions, blocks.q, work.NOBODY, 0.0),
        stack(tokens.ids_of_keys, tokens.positions_of_keys, blocks.k, 0.0, work.FAR),
    )


def position_tables(
    tokens: Tokens, frequencies: Array, q_marks: Any, k_marks: Any
) -> tuple[Array, Array]:
    return (
        position_table(tokens.positions, q_marks, frequencies),
        position_table(tokens.positions_of_keys, k_marks, frequencies),
    )


def position_table(positions: Array, marks: Any, frequencies: Array) -> Array:
    """Builds float32 [B H+MARKS T]: cosines, sines, segment ids, positions, zeros."""
    at = positions.astype(jnp.float32)
    at = jnp.pad(at, [(0, 0), (0, marks.shape[-1] - at.shape[-1])])
    angles = at[:, None] * frequencies.astype(jnp.float32)[None, :, None]
    spare = jnp.zeros((len(at), MARKS - 2, at.shape[-1]), jnp.float32)
    rows = jnp.cos(angles), jnp.sin(angles), jnp.asarray(marks, jnp.float32), spare
    return jnp.concatenate(rows, axis=1)
