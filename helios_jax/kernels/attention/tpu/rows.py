"""Where queries and keys stand, and the tables that the kernels read of it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from helios_jax.kernels.attention.tpu import work
from helios_jax.kernels.attention.tpu.layout import pad
from helios_jax.kernels.attention.tpu.tiles import MARKS
from helios_jax.kernels.attention.tpu.work import Blocks


class Rows(NamedTuple):
    """Where queries and keys stand. Without segments and keys of their own, rows are causal."""

    positions: Array  # [B T]
    segment_ids: Array | None
    key_positions: Array | None  # [B S]
    key_segment_ids: Array | None
    frequencies: Array  # [R]
    scale: Array  # float32 scalar, of the logits

    @property
    def segmented(self) -> bool:
        return any(x is not None for x in self[1:4])


def mark(rows: Rows, T: int, S: int, blocks: Blocks) -> tuple[Any, Any]:
    """Segments and positions of queries and keys: float32 [B 2 T or S], padded.

    In NumPy where the index alone says who sees whom: the list of work is then a constant, and the
    positions of padding at the end do no harm.
    """
    B = len(rows.positions)
    if not rows.segmented:
        queries, keys = np.arange(T + -T % blocks.q), np.arange(S + -S % blocks.k)
        return (
            np.stack([np.where(queries < T, 1, work.NOBODY), queries])[None].repeat(B, 0),
            np.stack([keys < S, np.where(keys < S, keys, work.FAR)])[None].repeat(B, 0),
        )
    segments = jnp.ones((B, T)) if rows.segment_ids is None else rows.segment_ids
    positions = rows.positions if rows.key_positions is None else rows.key_positions
    key_segments = rows.key_segment_ids
    if key_segments is None:
        key_segments = segments if rows.key_positions is None else jnp.ones((B, S))
    segments = jnp.where(segments > 0, segments, work.NOBODY)

    def stack(segments: Array, positions: Array, block: int, nobody: float, far: float) -> Array:
        padded = pad(segments, block, nobody), pad(positions, block, far)
        return jnp.stack([x.astype(jnp.float32) for x in padded], axis=1)

    return (
        stack(segments, rows.positions, blocks.q, work.NOBODY, 0.0),
        stack(key_segments, positions, blocks.k, 0.0, work.FAR),
    )


def tables(rows: Rows, q_marks: Any, k_marks: Any) -> tuple[Array, Array]:
    key_positions = rows.positions if rows.key_positions is None else rows.key_positions
    return (
        table(rows.positions, q_marks, rows.frequencies),
        table(key_positions, k_marks, rows.frequencies),
    )


def table(positions: Array, marks: Any, frequencies: Array) -> Array:
    """float32 [B H+MARKS T]: cosines, sines, segment ids, positions, zeros."""
    at = positions.astype(jnp.float32)
    at = jnp.pad(at, [(0, 0), (0, marks.shape[-1] - at.shape[-1])])
    angles = at[:, None] * frequencies.astype(jnp.float32)[None, :, None]
    spare = jnp.zeros((len(at), MARKS - 2, at.shape[-1]), jnp.float32)
    rows = jnp.cos(angles), jnp.sin(angles), jnp.asarray(marks, jnp.float32), spare
    return jnp.concatenate(rows, axis=1)
