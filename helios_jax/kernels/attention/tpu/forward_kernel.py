"""The forward kernel: online softmax over the listed blocks, G query heads stacked in one.

What softmax keeps of a row lies in all lanes of its sublane; its sum is kept a lane apart until the
end. Keys are taken in chunks, so that one chunk's softmax shares the bundles of the next's matmul.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels.attention.tpu import work
from helios_jax.kernels.attention.tpu.blocks import working_set
from helios_jax.kernels.attention.tpu.tiles import (
    LANES,
    LOG2E,
    MARKS,
    MASKED,
    capped,
    column,
    compact,
    dot,
    high,
    inverse,
    rotate,
    specs,
    spread,
    swapped,
    visible,
    walk,
)
from helios_jax.kernels.attention.tpu.work import Blocks, Work
from helios_jax.kernels.quantize import DTYPES, encode, exponents_for, pack


def forward(
    q: Array,
    k: Array,
    v: Array,
    q_table: Array,
    q_marks: Array,
    k_table: Array,
    scale: Array,
    listed: Work,
    *,
    blocks: Blocks,
    window: int,
    softcap: float,
    segmented: bool,
    residuals: str,
    vmem: int,
    interpret: Any,
) -> tuple[Array, Array, Any]:
    """(out [B K G T H], log-sum-exp float32 [B K G T], q, k and v as `residuals` or ()).

    These are `Stored` [B K G T H], [B K S H], [B K S H], with exponents [B K G T], [B K 1 S].

    Args:
      q: [B K G T H]; k, v: [B K S H], unrotated, T and S multiples of their blocks.
      q_table: float32 [B T H], cosines beside sines; q_marks: float32 [B MARKS T], segment ids,
        positions.
      k_table: float32 [B H+MARKS S]: cosines, sines, segment ids, positions.
      scale: float32 [1], of the logits in base 2.
      segmented: there is more than one segment, or padding between tokens.
      residuals: '' | fp8 | int8.
      vmem: bytes that the kernel may take.
    """
    B, K, G, T, H = q.shape
    S = k.shape[2]
    width = G * blocks.q
    kept_bytes = S * (2 * max(H, LANES) * q.dtype.itemsize + 4 * MARKS)
    cached = kept_bytes + working_set(blocks, G, H, q.dtype.itemsize, backward=False) <= vmem
    at = specs(q, blocks, cached)
    row = pltpu.VMEM((width, LANES), jnp.float32)
    rows, keys = (B, K, G, T), (B, K, S)
    shape = jax.ShapeDtypeStruct
    kept_specs: Any = ()
    kept_shapes: Any = ()
    if residuals:
        dtype = DTYPES[residuals]
        key_shape = shape((*keys, H), dtype), shape((B, K, 1, S), jnp.int8)
        kept_specs = (at.queries, at.rows), *[(at.begun_keys, at.begun_rows)] * 2
        kept_shapes = (shape(q.shape, dtype), shape(rows, jnp.int8)), key_shape, key_shape
    out, lse, kept = pl.pallas_call(
        functools.partial(
            kernel,
            blocks=blocks,
            window=window,
            softcap=softcap,
            segmented=segmented,
            cached=cached,
            residuals=residuals,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(K, listed.count),
            in_specs=[
                at.queries,
                at.begun_keys,
                at.begun_keys,
                at.upright_table,
                at.query_marks,
                at.begun_table,
            ],
            out_specs=(at.queries, at.rows, kept_specs),
            scratch_shapes=[
                pltpu.VMEM((width, H), q.dtype),
                pltpu.VMEM((S // blocks.k if cached else 1, H, blocks.k), q.dtype),
                pltpu.VMEM((S if cached else blocks.k, H), q.dtype),
                pltpu.VMEM((S // blocks.k if cached else 1, MARKS, blocks.k), jnp.float32),
                pltpu.VMEM((2, blocks.q, LANES), jnp.float32),
                row,
                row,
                pltpu.VMEM((width, H), jnp.float32),
            ],
        ),
        out_shape=(shape(q.shape, q.dtype), shape(rows, jnp.float32), kept_shapes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        interpret=interpret,
        name='helios_attention_forward',
    )(*listed[:-1], scale, q, k, v, q_table, q_marks, k_table)
    return out, lse, tuple(pack(*x) for x in kept)


def kernel(
    queries: Any, keys: Any, writes: Any, parts: Any, scale: Any,
    q_ref: Any, k_ref: Any, v_ref: Any, q_table: Any, q_marks: Any, k_table: Any,
    out_ref: Any, lse_ref: Any, kept: Any,
    q_rotated: Any, k_turned: Any, values: Any, k_marks: Any,
    marks: Any, greatest: Any, total: Any, out: Any,
    *, blocks: Blocks, window: int, softcap: float, segmented: bool, cached: bool, residuals: str,
) -> None:  # fmt: skip
    del queries, writes  # the index maps read them
    G, bq, H = q_ref.shape
    item = pl.program_id(1)
    flags = parts[item]
    slot: Any = high(keys[item]) if cached else 0
    first_key = slot * blocks.k

    @pl.when(flags & work.FIRST_Q != 0)
    def _() -> None:
        turn = q_table[...] * scale[0]  # cosines beside sines
        turned = swapped(turn)
        left = jax.lax.broadcasted_iota(jnp.int32, turn.shape, 1) < H // 2
        cos, sin = jnp.where(left, turn, turned), jnp.where(left, -turned, turn)
        for g in range(G):
            q, other = (x.astype(jnp.float32) for x in (q_ref[g], swapped(q_ref[g])))
            q_rotated[g * bq : (g + 1) * bq] = (q * cos + other * sin).astype(q_rotated.dtype)
        if segmented:
            for i in (0, 1):
                marks[i] = column(q_marks[i : i + 1])
        else:  # the position is the index
            index = jax.lax.broadcasted_iota(jnp.int32, (bq, LANES), 0)
            marks[1] = q_marks[1:2, :1] + index.astype(jnp.float32)
        if residuals:
            keep(kept[0], q_ref, residuals)
        # The first keys shrink to nothing what the last queries left in the sums.
        greatest[...] = jnp.full_like(greatest, MASKED)

    @pl.when(item == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        out[...] = jnp.zeros_like(out)

    # Rotated keys and values stay in VMEM for the queries to come, if a head's all fit.
    @pl.when(flags & work.FIRST_K != 0 if cached else item >= 0)
    def _() -> None:
        k = rotate(k_ref[...].T.astype(jnp.float32), k_table)
        k_turned[slot] = k.astype(k_turned.dtype)
        k_marks[slot] = k_table[H:]
        values[pl.ds(pl.multiple_of(first_key, blocks.k), blocks.k)] = v_ref[...]
        if residuals:
            keep(kept[1], k_ref, residuals)
            keep(kept[2], v_ref, residuals)

    def attend(start: Any, size: int, masked: bool) -> None:
        """Adds the keys [start, start + size) of this block to what its queries have seen."""
        for chunk in range(0, size, blocks.width):
            add(start + chunk, min(blocks.width, size), masked)

    def add(start: Any, size: int, masked: bool) -> None:
        at = pl.ds(start, size)
        logits = capped(dot(q_rotated[...], k_turned[slot, :, at], (1, 0)), softcap)
        if masked:
            segments, positions = (jnp.tile(spread(marks[i], size), (G, 1)) for i in (0, 1))
            rows = k_marks[slot, :1, at], k_marks[slot, 1:2, at]
            seen = visible((segments, positions), rows, window, segmented)
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
        share = inverse(sums, steps=1 if out_ref.dtype == jnp.bfloat16 else 2)
        if segmented:  # otherwise each query sees itself
            share = jnp.where(greatest[...] > MASKED / 2, share, 0)
        result = out[...] * spread(share, H)
        for g in range(G):
            at = slice(g * bq, (g + 1) * bq)
            out_ref[g] = result[at].astype(out_ref.dtype)
            lse_ref[g : g + 1] = lse[:, at]


def keep(kept: Any, x_ref: Any, form: str) -> None:
    """Writes a block [heads n H], or [n H], in a byte a value, and the exponents of its rows."""
    payload, exponents = kept
    rows = []
    for head in range(x_ref.shape[0]) if x_ref.ndim == 3 else (...,):
        x = x_ref[head].astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        payload[head] = encode(x, largest, form)
        rows.append(exponents_for(compact(jnp.broadcast_to(largest, (len(x), LANES))), form))
    exponents[...] = jnp.concatenate(rows)
