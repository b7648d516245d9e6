"""The backward kernel: dq, dk and dv in one pass over the listed blocks.

Logits are [keys, queries]: what the forward kernel kept of a query is a row here.

The order is the forward kernel's: blocks of keys within blocks of queries. dq of a block of queries
lies in VMEM until its keys are through; dk and dv of all keys of a head, for a group of query heads
together, until the last queries that see them. Only finished gradients are written, unrotated.
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
    MARKS,
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

KEY_SHARE = 0.6  # of the VMEM, for what is kept of keys


def keys_in_memory(q: Array, blocks: Blocks, vmem: int) -> int:
    """How many keys of a head, a multiple of the block, have all that is kept of them in VMEM."""
    H = q.shape[-1]
    lanes = max(H, LANES)
    each = 2 * 4 * lanes + (2 * lanes + H) * q.dtype.itemsize
    return max(int(KEY_SHARE * vmem) // each // blocks.k, 1) * blocks.k


def backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    cotangent: Array,
    dq: Array | None,
    q_table: Array,
    k_table: Array,
    *,
    scale: Array,
    listed: Work,
    blocks: Blocks,
    window: int,
    softcap: float,
    segmented: bool,
    vmem: int,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """(dq [B K G T H], dk and dv [B K S H]) of unrotated q and k.

    Args:
      out, cotangent: [B K G T H]; lse: float32 [B K G T], natural, over all keys.
      dq: float32 [B K G T H] to add to (it becomes the result's buffer): of other keys. None: dq is
        written in q's dtype.
      The rest as `forward`.
    """
    K, G, _, H = q.shape[1:]
    S = k.shape[2]
    width = G * blocks.q
    at = specs(q, blocks, cached=True)
    body = functools.partial(
        kernel if dq is None else add_kernel,
        blocks=blocks,
        window=window,
        softcap=softcap,
        segmented=segmented,
    )
    tile = functools.partial(pltpu.VMEM, dtype=q.dtype)
    total = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    inputs = [q, k, v, out, lse, cotangent, q_table, k_table]
    in_specs = [at.queries, at.begun_keys, at.begun_keys, at.queries, at.rows, at.queries]
    in_specs += [at.query_table, at.key_table]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(K, listed.count),
            in_specs=in_specs if dq is None else [*in_specs, at.queries],
            out_specs=[at.queries, at.finished_keys, at.finished_keys],
            scratch_shapes=[
                tile((H, width)),
                tile((H, width)),
                tile((S // blocks.k, H, blocks.k)),
                tile((S, H)),
                tile((S, H)),
                total((MARKS, width)),
                total((1, width)),
                total((1, width)),
                total((H, width)),
                total((S, H)),
                total((S, H)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype if dq is None else jnp.float32),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        input_output_aliases={} if dq is None else {5 + len(inputs): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        interpret=interpret,
        name='helios_attention_backward',
    )(*listed[:-1], scale, *inputs, *([] if dq is None else [dq]))


def add_kernel(*refs: Any, **options: Any) -> None:
    """`kernel`, on top of what dq holds."""
    kernel(*refs[:13], *refs[14:], earlier=refs[13], **options)


def kernel(
    queries: Any, keys: Any, writes: Any, parts: Any, scale: Any,
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, lse_ref: Any, cotangent_ref: Any,
    q_table: Any, k_table: Any,
    dq_ref: Any, dk_ref: Any, dv_ref: Any,
    q_turned: Any, cotangent: Any, k_turned: Any, k_upright: Any, v_upright: Any,
    marks: Any, lse: Any, delta: Any, dq: Any, dk: Any, dv: Any,
    *, earlier: Any = None, blocks: Blocks, window: int, softcap: float, segmented: bool,
) -> None:  # fmt: skip
    del queries, writes  # the index maps read them
    G, bq, H = q_ref.shape
    item = pl.program_id(1)
    flags = parts[item]
    j = high(keys[item])
    first_key = pl.multiple_of(j * blocks.k, blocks.k)
    block = pl.ds(first_key, blocks.k)

    @pl.when(flags & work.FIRST_Q != 0)
    def _() -> None:
        for g in range(G):
            at = slice(g * bq, (g + 1) * bq)
            q = rotate(q_ref[g].T.astype(jnp.float32), q_table) * scale[0]
            q_turned[:, at] = q.astype(q_turned.dtype)
            cotangent[:, at] = cotangent_ref[g].T
            marks[:, at] = q_table[H:]
            product = cotangent[:, at].astype(jnp.float32) * out_ref[g].T.astype(jnp.float32)
            delta[:, at] = jnp.sum(product, axis=0, keepdims=True)
            # A query that saw nothing has −∞ here; from +10³⁰ its weights come out as zero.
            seen = lse_ref[g : g + 1] > MASKED
            lse[:, at] = jnp.where(seen, lse_ref[g : g + 1] * LOG2E, -MASKED)
        dq[...] = jnp.zeros_like(dq)

    @pl.when(flags & work.FIRST_K != 0)
    def _() -> None:
        k = rotate(k_ref[...].T.astype(jnp.float32), k_table).astype(k_turned.dtype)
        k_turned[j] = k
        k_upright[block] = k.T
        v_upright[block] = v_ref[...]
        dk[block] = jnp.zeros((blocks.k, H), jnp.float32)
        dv[block] = jnp.zeros((blocks.k, H), jnp.float32)

    def attend(start: Any, size: int, masked: bool) -> None:
        """Adds the gradients through the keys [start, start + size) of this block."""
        part = pl.ds(start, size)
        at = pl.ds(pl.multiple_of(first_key + start, size), size)
        for lane in range(0, G * bq, blocks.width):
            on = slice(lane, min(lane + blocks.width, G * bq))
            q, do = q_turned[:, on], cotangent[:, on]
            logits = capped(dot(k_upright[at], q, (1, 0)), softcap)
            slope = 1 - jnp.square(logits / (softcap * LOG2E)) if softcap else None
            if masked:
                rows = k_table[H : H + 2, part]
                segment, position = (
                    spread(column(rows[i : i + 1]), logits.shape[1]) for i in (0, 1)
                )
                q_marks = marks[:1, on], marks[1:2, on]
                seen = visible(q_marks, (segment, position), window, segmented)
                logits = jnp.where(seen, logits, MASKED)
            weights = jnp.exp2(logits - lse[:, on])
            change = weights * (dot(v_upright[at], do, (1, 0)) - delta[:, on])
            if slope is not None:
                change = change * slope
            change = change.astype(q.dtype)
            dv[at] += dot(weights.astype(q.dtype), do, (1, 1))
            dk[at] += dot(change, q, (1, 1))
            dq[:, on] += dot(k_turned[j, :, part], change, (1, 0))

    @pl.when(flags & work.FULL != 0)
    def _() -> None:
        attend(0, blocks.k, masked=False)

    @pl.when(flags & work.FULL == 0)
    def _() -> None:
        def one(part: Array, _: None) -> None:
            attend(pl.multiple_of(part * blocks.part, blocks.part), blocks.part, masked=True)

        jax.lax.fori_loop(flags & 0xFF, flags >> 8 & 0xFF, one, None)

    @pl.when(flags & work.LAST_Q != 0)
    def _() -> None:
        for g in range(G):
            # q came in scaled by `scale`, which has log₂e in it; the logits' gradient is natural.
            x = rotate(dq[:, g * bq : (g + 1) * bq], q_table, -1) * (scale[0] / LOG2E)
            dq_ref[g] = (x.T if earlier is None else x.T + earlier[g]).astype(dq_ref.dtype)

    @pl.when(flags & work.LAST_K != 0)
    def _() -> None:
        dk_ref[...] = rotate(dk[block].T / LOG2E, k_table, -1).T.astype(dk_ref.dtype)
        dv_ref[...] = dv[block].astype(dv_ref.dtype)
