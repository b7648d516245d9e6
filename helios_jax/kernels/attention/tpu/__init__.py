"""Attention on TPU: Helios's own kernels, forward and backward.

Queries and keys are rotated in the kernels; blocks that see nothing of each other are neither
fetched nor stepped over; residuals are q, k, v, the output and one float a row and head. The
kernels take [B heads T H]: the transpose around them folds into the projections' layouts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Num

from helios_jax.kernels.attention.splash import RESIDUALS
from helios_jax.kernels.attention.tpu import backward_kernel, forward_kernel, work
from helios_jax.kernels.attention.tpu import blocks as sizes
from helios_jax.kernels.attention.tpu.tiles import LOG2E, MARKS
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


@dataclasses.dataclass(frozen=True)
class Options:
    """What the kernels are compiled for."""

    window: int
    softcap: float
    forward: Blocks
    backward: Blocks
    vmem: int  # bytes
    interpret: Any


def attention(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
    **arguments: Any,
) -> Float[Array, 'B T N H']:
    """As `kernels.attention.attention`, on one device's arrays, whose other arguments it takes.

    Args:
      interpret: run the kernels in Python on any device; `pltpu.InterpretParams` looks for races.
      blocks: of the forward and the backward kernel; by table unless given.
    Raises:
      NotImplementedError: H not a multiple of 32, or a dtype other than bfloat16 and float32.
    """
    rows, options = prepare(q, k, interpret=interpret, blocks=blocks, **arguments)
    return differentiable(options, q, k, v, rows)


def forward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
    **arguments: Any,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B N T']]:
    """(output, natural log-sum-exp of the logits in float32: −∞ where a query sees nothing).

    Arguments and errors are `attention`'s.
    """
    rows, options = prepare(q, k, interpret=interpret, blocks=blocks, **arguments)
    return run_forward(options, q, k, v, rows)


def backward(
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    out: Float[Array, 'B T N H'],
    lse: Float[Array, 'B N T'],
    cotangent: Float[Array, 'B T N H'],
    *,
    interpret: Any = False,
    blocks: tuple[Blocks, Blocks] | None = None,
    **arguments: Any,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """(dq, dk, dv) of unrotated q and k; `out` and `lse` may be over more keys than k holds.

    Arguments and errors are `attention`'s.
    """
    rows, options = prepare(q, k, interpret=interpret, blocks=blocks, **arguments)
    return run_backward(options, q, k, v, out, lse, cotangent, rows)


def check(q: Array) -> None:
    """Raises NotImplementedError for what the kernels cannot take."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f'cannot take {q.dtype}: only bfloat16 and float32.')
    if q.shape[-1] % 32:
        raise NotImplementedError(f'cannot take H={q.shape[-1]}: it must be a multiple of 32.')


def prepare(
    q: Array,
    k: Array,
    *,
    positions: Num[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None,
    key_positions: Num[Array, 'B S'] | None,
    key_segment_ids: Int[Array, 'B S'] | None,
    frequencies: Float[Array, 'R'],
    query_scale: float | Float[Array, ''],
    scale: float,
    window: int,
    softcap: float,
    interpret: Any,
    blocks: tuple[Blocks, Blocks] | None,
) -> tuple[Rows, Options]:
    check(q)
    (T, N, H), (S, K) = q.shape[1:], k.shape[1:3]
    target = sizes.generation()
    choose = functools.partial(sizes.choose, target, N // K, H, T, S, q.dtype == jnp.float32)
    chosen = blocks or (choose(backward=False), choose(backward=True))
    total = jnp.asarray(query_scale, jnp.float32) * scale
    rows = Rows(positions, segment_ids, key_positions, key_segment_ids, frequencies, total)
    return rows, Options(window, softcap, *chosen, sizes.VMEM[target], interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(options: Options, q: Array, k: Array, v: Array, rows: Rows) -> Array:
    return run_forward(options, q, k, v, rows)[0]


def forward_rule(options: Options, q: Array, k: Array, v: Array, rows: Rows) -> tuple[Array, Any]:
    # Under a remat policy that saves this name, backward does not run the forward kernel again.
    out, lse = checkpoint_name(run_forward(options, q, k, v, rows), RESIDUALS)
    return out, (q, k, v, out, lse, rows)


def backward_rule(options: Options, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    q, k, v, out, lse, rows = saved
    return *run_backward(options, q, k, v, out, lse, cotangent, rows), None


differentiable.defvjp(forward_rule, backward_rule)


def run_forward(options: Options, q: Array, k: Array, v: Array, rows: Rows) -> tuple[Array, Array]:
    (T, N), K, blocks = q.shape[1:3], k.shape[2], options.forward
    listed, both = plan(rows, T, k.shape[1], blocks, options.window)
    out, lse = forward_kernel.forward(
        heads_first(q, K, blocks.q),
        heads_first(k, 0, blocks.k),
        heads_first(v, 0, blocks.k),
        *both,
        rows.scale.reshape(1) * LOG2E,
        listed,
        blocks=blocks,
        window=options.window,
        softcap=options.softcap,
        segmented=rows.segmented,
        vmem=options.vmem,
        interpret=options.interpret,
    )
    return tokens_first(out, T), lse.reshape(len(q), N, -1)[:, :, :T]


def run_backward(
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    cotangent: Array,
    rows: Rows,
) -> tuple[Array, Array, Array]:
    (T, N), (S, K), blocks = q.shape[1:3], k.shape[1:3], options.backward
    queries, out, cotangent = (heads_first(x, K, blocks.q) for x in (q, out, cotangent))
    # A query that saw nothing has −∞, and padding is such a query.
    lse = pad(lse, blocks.q, -jnp.inf).reshape(len(q), K, N // K, -1)
    keys, values = (heads_first(x, 0, blocks.k) for x in (k, v))
    kernel = functools.partial(
        backward_kernel.backward,
        scale=rows.scale.reshape(1) * LOG2E,
        blocks=blocks,
        window=options.window,
        softcap=options.softcap,
        segmented=rows.segmented,
        vmem=options.vmem,
        interpret=options.interpret,
    )
    most, total = backward_kernel.keys_in_memory(queries, blocks, options.vmem), keys.shape[2]
    if total <= most:
        listed, both = plan(rows, T, S, blocks, options.window)
        arrays = queries, keys, values, out, lse, cotangent, None, *both
        dq, dk, dv = kernel(*arrays, listed=listed)
        return tokens_first(dq, T), tokens_first(dk, S), tokens_first(dv, S)

    chunk = -(-total // -(-total // most) // blocks.k) * blocks.k
    q_marks, k_marks = (jnp.asarray(x, jnp.float32) for x in mark(rows, T, S, blocks))
    q_table, k_table = tables(rows, q_marks, k_marks)

    def one(dq: Array, part: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        keys, values, marks, k_table = part
        listed = work.make(q_marks, marks, blocks, options.window, ordered=False)
        arrays = queries, keys, values, out, lse, cotangent, dq, q_table, k_table
        dq, *gradients = kernel(*arrays, listed=listed)
        return dq, tuple(gradients)

    chunks = (
        in_chunks(keys, chunk, -2),
        in_chunks(values, chunk, -2),
        in_chunks(k_marks, chunk),
        in_chunks(k_table, chunk),
    )
    dq, gradients = jax.lax.scan(one, jnp.zeros(queries.shape, jnp.float32), chunks)
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(*keys.shape[:2], -1, keys.shape[-1]) for x in gradients)
    return tokens_first(dq, T).astype(q.dtype), tokens_first(dk, S), tokens_first(dv, S)


def in_chunks(x: Array, size: int, axis: int = -1) -> Array:
    """An axis cut into chunks, which come first; the last is padded with zeros: no segment."""
    x = pad(x, size, axis=axis)
    axis %= x.ndim
    cut = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def pad(x: Array, multiple: int, value: float = 0.0, axis: int = -1) -> Array:
    """With `value`, an axis to a multiple."""
    missing = -x.shape[axis] % multiple
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value) if missing else x


def heads_first(x: Array, K: int, block: int) -> Array:
    """[B T N H] → [B K G T H], or [B T K H] → [B K T H] where K is 0; T padded to a block."""
    B, T, N, H = x.shape
    grouped = x.reshape(B, T, K, N // K, H) if K else x
    return pad(jnp.moveaxis(grouped, 1, -2), block, axis=-2)


def tokens_first(x: Array, T: int) -> Array:
    """The inverse of `heads_first`."""
    x = jnp.moveaxis(x[..., :T, :], -2, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def plan(
    rows: Rows, T: int, S: int, blocks: Blocks, window: int
) -> tuple[work.Work, tuple[Array, Array]]:
    """The list of work, and the tables of queries and keys: float32 [B H+MARKS T or S], padded."""
    marks = mark(rows, T, S, blocks)
    listed = work.make(*marks, blocks, window, ordered=rows.key_positions is None)
    return listed, tables(rows, *marks)


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
