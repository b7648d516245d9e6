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
from helios_jax.kernels.attention.tpu.tiles import (
    LANES,
    LOG2E,
    MASKED,
    capped,
    column,
    dot,
    high,
    rotate,
    specs,
    spread,
    visible,
)
from helios_jax.kernels.attention.tpu.work import Blocks, Work

KEY_SHARE = 0.7  # of the VMEM, for keys and values kept from one block of queries to the next


def forward(
    q: Array,
    k: Array,
    v: Array,
    q_table: Array,
    k_table: Array,
    scale: Array,
    listed: Work,
    *,
    blocks: Blocks,
    window: int,
    softcap: float,
    segmented: bool,
    vmem: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """(out [B K G T H], log-sum-exp float32 [B K G T]).

    Args:
      q: [B K G T H]; k, v: [B K S H], unrotated, T and S multiples of their blocks.
      q_table, k_table: float32 [B H+MARKS T or S]: cosines, sines, segment ids, positions.
      scale: float32 [1], of the logits in base 2.
      segmented: there is more than one segment, or padding between tokens.
      vmem: bytes that the kernel may take.
    """
    B, K, G, T, H = q.shape
    S = k.shape[2]
    width = G * blocks.q
    cached = 2 * S * max(H, LANES) * q.dtype.itemsize <= KEY_SHARE * vmem
    at = specs(q, blocks, cached)
    row = pltpu.VMEM((width, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(
            kernel,
            blocks=blocks,
            window=window,
            softcap=softcap,
            segmented=segmented,
            cached=cached,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(K, listed.count),
            in_specs=[at.queries, at.begun_keys, at.begun_keys, at.query_table, at.key_table],
            out_specs=[at.queries, at.rows],
            scratch_shapes=[
                pltpu.VMEM((width, H), q.dtype),
                pltpu.VMEM((S // blocks.k if cached else 1, H, blocks.k), q.dtype),
                pltpu.VMEM((S if cached else blocks.k, H), q.dtype),
                pltpu.VMEM((2, blocks.q, LANES), jnp.float32),
                row,
                row,
                pltpu.VMEM((width, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, K, G, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        interpret=interpret,
        name='helios_attention_forward',
    )(*listed[:-1], scale, q, k, v, q_table, k_table)


def kernel(
    queries: Any, keys: Any, writes: Any, parts: Any, scale: Any,
    q_ref: Any, k_ref: Any, v_ref: Any, q_table: Any, k_table: Any,
    out_ref: Any, lse_ref: Any,
    q_rotated: Any, k_turned: Any, values: Any, marks: Any, greatest: Any, total: Any, out: Any,
    *, blocks: Blocks, window: int, softcap: float, segmented: bool, cached: bool,
) -> None:  # fmt: skip
    del queries, writes  # the index maps read them
    G, bq, H = q_ref.shape
    item = pl.program_id(1)
    flags = parts[item]
    slot: Any = high(keys[item]) if cached else 0
    first_key = slot * blocks.k

    @pl.when(flags & work.FIRST_Q != 0)
    def _() -> None:
        for g in range(G):
            at = slice(g * bq, (g + 1) * bq)
            q = rotate(q_ref[g].T.astype(jnp.float32), q_table) * scale[0]
            q_rotated[at] = q.astype(q_rotated.dtype).T
        for i in (0, 1):
            marks[i] = column(q_table[H + i : H + i + 1])
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
        values[pl.ds(pl.multiple_of(first_key, blocks.k), blocks.k)] = v_ref[...]

    def attend(start: Any, size: int, masked: bool) -> None:
        """Adds the keys [start, start + size) of this block to what its queries have seen."""
        at = pl.ds(start, size)
        logits = capped(dot(q_rotated[...], k_turned[slot, :, at], (1, 0)), softcap)
        if masked:
            segments, positions = (jnp.tile(spread(marks[i], size), (G, 1)) for i in (0, 1))
            k_marks = k_table[H : H + 1, at], k_table[H + 1 : H + 2, at]
            logits = jnp.where(
                visible((segments, positions), k_marks, window, segmented), logits, MASKED
            )
        before = greatest[...]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights, shrink = jnp.exp2(logits - spread(now, size)), jnp.exp2(before - now)
        greatest[...] = now
        lanes = [weights[:, i : i + LANES] for i in range(0, size, LANES)]
        total[...] = total[...] * shrink + functools.reduce(jnp.add, lanes)
        seen = pl.ds(pl.multiple_of(first_key + start, size), size)
        value = dot(weights.astype(values.dtype), values[seen], (1, 0))
        out[...] = out[...] * spread(shrink, H) + value

    @pl.when(flags & work.FULL != 0)
    def _() -> None:
        for start in range(0, blocks.k, blocks.width):
            attend(start, min(blocks.width, blocks.k), masked=False)

    @pl.when(flags & work.FULL == 0)
    def _() -> None:
        def one(part: Array, _: None) -> None:
            attend(pl.multiple_of(part * blocks.part, blocks.part), blocks.part, masked=True)

        jax.lax.fori_loop(flags & 0xFF, flags >> 8 & 0xFF, one, None)

    @pl.when(flags & work.LAST_Q != 0)
    def _() -> None:
        seen = greatest[...] > MASKED / 2
        sums = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), seen.shape)
        result = out[...] * spread(jnp.where(seen, 1 / sums, 0), H)
        lse = jnp.where(seen, (greatest[...] + jnp.log2(sums)) / LOG2E, -jnp.inf).T
        for g in range(G):
            at = slice(g * bq, (g + 1) * bq)
            out_ref[g] = result[at].astype(out_ref.dtype)
            lse_ref[g : g + 1] = lse[:1, at]
