"""The forward kernel: online softmax over the listed blocks, G query heads stacked in one.

work.py tells the life of a work item. The greatest logit of a row lies in all lanes of its sublane;
its sum is kept lane by lane until the end. Keys are taken in chunks, so that one chunk's softmax
shares the bundles of the next's matmul.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels.attention.tpu import work
from helios_jax.kernels.attention.tpu.blocks import working_set
from helios_jax.kernels.attention.tpu.specs import MARKS, Static, high, specs
from helios_jax.kernels.attention.tpu.tiles import (
    LANES,
    LOG2E,
    MASKED,
    Ref,
    capped,
    column,
    compact,
    cost,
    dot,
    inverse,
    rotate,
    spread,
    swapped,
    visible,
    walk,
)
from helios_jax.kernels.attention.tpu.work import Items, Work
from helios_jax.kernels.quantize import DTYPES, encode, exponents_for, pack


class ForwardInputs(NamedTuple):
    """Inputs: arrays, their block specs, or references to blocks. q and k are unrotated."""

    q: Any  # [B K G T H]
    k: Any  # [B K S H]
    v: Any
    q_table: Any  # float32 [B T H], cosines beside sines
    q_marks: Any  # float32 [B MARKS T]: segment ids, positions
    k_table: Any  # float32 [B H+MARKS S]: cosines, sines, segment ids, positions


class ForwardOutputs(NamedTuple):
    """Outputs of the kernel: shapes, block specs, references to blocks, or arrays."""

    out: Any  # [B K G T H]
    lse: Any  # float32 [B K G T]
    # (payload, exponents) of q, k and v, or (): [B K G T H] and [B K G T], [B K S H] and [B K 1 S].
    kept: Any


class ForwardScratch(NamedTuple):
    """Buffers in VMEM that live across items. A row is a query of one of the G heads."""

    q_rotated: Ref  # [G·q H], scaled too
    k_turned: Ref  # [blocks of keys, H, k], rotated; one block where not all keys are cached
    values: Ref  # [keys H]
    k_marks: Ref  # float32 [blocks of keys, MARKS, k]
    q_marks: Ref  # float32 [2 q LANES]: segment and position of each query, in all lanes
    greatest: Ref  # float32 [G·q LANES]: the greatest logit of a row so far, in all lanes
    total: Ref  # float32 [G·q LANES]: its sum of weights, still to be added over the lanes
    out: Ref  # float32 [G·q H]: its weighted sum of values


def forward(
    x: ForwardInputs,
    scale: Array,
    listed: Work,
    static: Static,
    vmem: int,
    interpret: Any,
) -> tuple[Array, Array, Any]:
    """Returns out [B K G T H], log-sum-exp float32 [B K G T], and stored q, k and v or ().

    The form of the stored ones is `static.residuals`: [B K G T H] with exponents [B K G T], and
    [B K S H] with exponents [B K 1 S].

    Args:
      x: inputs, with T and S multiples of their blocks.
      scale: float32 [1], factor on the logits, in base 2.
      vmem: bytes that the kernel may take.
    """
    B, K, G, T, H = x.q.shape
    S, dtype, blocks = x.k.shape[2], x.q.dtype, static.blocks
    width = G * blocks.q
    kept_bytes = S * (2 * max(H, LANES) * dtype.itemsize + 4 * MARKS)
    cached = kept_bytes + working_set(blocks, G, H, dtype.itemsize, backward=False) <= vmem
    static = static._replace(cached=cached)
    at = specs(x.q, static)
    shape = jax.ShapeDtypeStruct
    shapes = ForwardOutputs(shape(x.q.shape, dtype), shape((B, K, G, T), jnp.float32), ())
    places = ForwardOutputs(at.queries, at.rows, ())
    if static.residuals:
        form = DTYPES[static.residuals]
        kept_q = shape(x.q.shape, form), shape((B, K, G, T), jnp.int8)
        kept_k = shape((B, K, S, H), form), shape((B, K, 1, S), jnp.int8)
        shapes = shapes._replace(kept=(kept_q, kept_k, kept_k))
        kept_keys = at.begun_keys, at.begun_rows
        places = places._replace(kept=((at.queries, at.rows), kept_keys, kept_keys))
    num_blocks = S // blocks.k if cached else 1
    tile = functools.partial(pltpu.VMEM, dtype=dtype)
    total = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    # A pytree alone would be taken apart: the kernel gets each in one piece, out of a tuple of one.
    (y,) = pl.pallas_call(
        functools.partial(kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(K, listed.count),
            in_specs=(
                ForwardInputs(
                    at.queries,
                    at.begun_keys,
                    at.begun_keys,
                    at.upright_table,
                    at.query_marks,
                    at.begun_table,
                ),
            ),
            out_specs=(places,),
            scratch_shapes=(
                ForwardScratch(
                    q_rotated=tile((width, H)),
                    k_turned=tile((num_blocks, H, blocks.k)),
                    values=tile((num_blocks * blocks.k, H)),
                    k_marks=total((num_blocks, MARKS, blocks.k)),
                    q_marks=total((2, blocks.q, LANES)),
                    greatest=total((width, LANES)),
                    total=total((width, LANES)),
                    out=total((width, H)),
                ),
            ),
        ),
        out_shape=(shapes,),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        cost_estimate=cost(x.q.shape, S, static.window, 2, (x, shapes)),
        interpret=interpret,
        name='helios_attention_forward',
    )(listed.items, scale, x)
    return y.out, y.lse, tuple(pack(*kept) for kept in y.kept)


def kernel(
    static: Static,
    items: Items,
    scale: Ref,
    x: ForwardInputs,
    y: ForwardOutputs,
    scratch: ForwardScratch,
) -> None:
    """Runs one work item of one key head."""
    (G, bq, H), blocks, residuals = x.q.shape, static.blocks, static.residuals
    q_rotated, k_turned, values, k_marks, q_marks, greatest, total, out = scratch
    item = pl.program_id(1)
    flags = items.strips[item]
    slot: Any = high(items.keys[item]) if static.cached else 0
    first_key = slot * blocks.k

    @pl.when(flags & work.FIRST_Q != 0)
    def _() -> None:
        turn = x.q_table[...] * scale[0]  # cosines beside sines
        turned = swapped(turn)
        left = jax.lax.broadcasted_iota(jnp.int32, turn.shape, 1) < H // 2
        cos, sin = jnp.where(left, turn, turned), jnp.where(left, -turned, turn)
        for g in range(G):
            q, other = (a.astype(jnp.float32) for a in (x.q[g], swapped(x.q[g])))
            q_rotated[g * bq : (g + 1) * bq] = (q * cos + other * sin).astype(q_rotated.dtype)
        if static.segmented:
            for i in (0, 1):
                q_marks[i] = column(x.q_marks[i : i + 1])
        else:  # the position is the index
            index = jax.lax.broadcasted_iota(jnp.int32, (bq, LANES), 0)
            q_marks[1] = x.q_marks[1:2, :1] + index.astype(jnp.float32)
        if residuals:
            keep(y.kept[0], x.q, residuals)
        # The first keys shrink to nothing what the last queries left in the sums.
        greatest[...] = jnp.full_like(greatest, MASKED)

    @pl.when(item == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        out[...] = jnp.zeros_like(out)

    # Rotated keys and values stay in VMEM for the queries to come, if a head's all fit.
    @pl.when(flags & work.FIRST_K != 0 if static.cached else item >= 0)
    def _() -> None:
        k = rotate(x.k[...].T.astype(jnp.float32), x.k_table)
        k_turned[slot] = k.astype(k_turned.dtype)
        k_marks[slot] = x.k_table[H:]
        values[pl.ds(pl.multiple_of(first_key, blocks.k), blocks.k)] = x.v[...]
        if residuals:
            keep(y.kept[1], x.k, residuals)
            keep(y.kept[2], x.v, residuals)

    def attend(start: Any, size: int, masked: bool) -> None:
        """Adds the keys [start, start + size) of this block to the sums of its queries."""
        for chunk in range(0, size, blocks.width):
            add(start + chunk, min(blocks.width, size), masked)

    def add(start: Any, size: int, masked: bool) -> None:
        at = pl.ds(start, size)
        logits = capped(dot(q_rotated[...], k_turned[slot, :, at], (1, 0)), static.softcap)
        if masked:
            segments, positions = (jnp.tile(spread(q_marks[i], size), (G, 1)) for i in (0, 1))
            rows = k_marks[slot, :1, at], k_marks[slot, 1:2, at]
            seen = visible((segments, positions), rows, static)
            logits = jnp.where(seen, logits, MASKED)
        before = greatest[...]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights, shrink = jnp.exp2(logits - spread(now, size)), jnp.exp2(before - now)
        greatest[...] = now
        lanes = [weights[:, i : i + LANES] for i in range(0, size, LANES)]
        total[...] = total[...] * shrink + functools.reduce(jnp.add, lanes)
        here = pl.ds(pl.multiple_of(first_key + start, size), size)
        value = dot(weights.astype(values.dtype), values[here], (1, 0))
        out[...] = out[...] * spread(shrink, H) + value

    walk(flags, blocks, attend)

    @pl.when(flags & work.LAST_Q != 0)
    def _() -> None:
        sums = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), total.shape)
        most = compact(greatest[...])
        lse = jnp.where(most > MASKED / 2, (most + jnp.log2(compact(sums))) / LOG2E, -jnp.inf)
        share = inverse(sums, steps=1 if y.out.dtype == jnp.bfloat16 else 2)
        if static.segmented:  # otherwise each query sees itself
            share = jnp.where(greatest[...] > MASKED / 2, share, 0)
        result = out[...] * spread(share, H)
        for g in range(G):
            at = slice(g * bq, (g + 1) * bq)
            y.out[g] = result[at].astype(y.out.dtype)
            y.lse[g : g + 1] = lse[:, at]


def keep(kept: tuple[Ref, Ref], x: Ref, form: str) -> None:
    """Writes a block [heads n H], or [n H], in a byte a value, and the exponents of its rows."""
    payload, exponents = kept
    rows = []
    for head in range(x.shape[0]) if x.ndim == 3 else (...,):
        values = x[head].astype(jnp.float32)
        largest = jnp.max(jnp.abs(values), axis=1, keepdims=True)
        payload[head] = encode(values, largest, form)
        spread_out = jnp.broadcast_to(largest, (len(values), LANES))
        rows.append(exponents_for(compact(spread_out), form))
    exponents[...] = jnp.concatenate(rows)
