"""The backward kernel: dq, dk and dv in one pass over the listed blocks.

Logits are [keys, queries]: what the forward kernel kept of a query is a row here.

The order is the forward kernel's: blocks of keys within blocks of queries. dq of a block of queries
lies in VMEM until its keys are through; dk and dv of all keys of a head, for a group of query heads
together, until the last queries that see them. Only finished gradients are written, unrotated.
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
    walk,
)
from helios_jax.kernels.attention.tpu.work import Blocks, Work
from helios_jax.kernels.quantize import Stored, power_of_two


def keys_in_memory(out: Any, blocks: Blocks, vmem: int, in_chunks: bool = False) -> int:
    """How many keys of a head, a multiple of the block, have all that is kept of them in VMEM.

    Args:
      out: [B K G T H], in the dtype of q, k and v.
      in_chunks: there are more keys than that.
    """
    G, H, itemsize = out.shape[2], out.shape[-1], out.dtype.itemsize
    lanes = max(H, LANES)
    each = 2 * 4 * lanes + (2 * lanes + H) * itemsize
    free = vmem - working_set(blocks, G, H, itemsize, True, in_chunks)
    return max(free // each // blocks.k, 1) * blocks.k


class Inputs(NamedTuple):
    """Arrays, or their block specs, or references to blocks.

    q, k and v are unrotated: an array, or `Stored`.
    """

    q: Any  # [B K G T H]; exponents [B K G T]
    k: Any  # [B K S H]; exponents [B K 1 S]
    v: Any
    out: Any  # [B K G T H], as `cotangent`
    lse: Any  # float32 [B K G T], natural, over all keys
    cotangent: Any
    q_table: Any  # float32 [B H+MARKS T], as `k_table` [B H+MARKS S]
    k_table: Any
    # Float32 [B K G T H], dq of other keys, which becomes the result's buffer; or (), and dq is
    # written in the dtype of `out`.
    earlier: Any


def backward(
    inputs: Inputs,
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
    """(dq [B K G T H], dk and dv [B K S H]) of unrotated q and k. Arguments as `forward`'s."""
    B, K, G, T, H = inputs.out.shape
    S = inputs.k_table.shape[-1]
    width, dtype = G * blocks.q, inputs.out.dtype
    q, k, v = (x._replace(payload=x.values) if isinstance(x, Stored) else x for x in inputs[:3])
    inputs = inputs._replace(q=q, k=k, v=v)
    at = specs(inputs.out, blocks, cached=True)
    tile = functools.partial(pltpu.VMEM, dtype=dtype)
    total = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    in_specs = Inputs(
        block(inputs.q, at.queries, at.rows),
        block(inputs.k, at.begun_keys, at.begun_rows),
        block(inputs.v, at.begun_keys, at.begun_rows),
        at.queries,
        at.rows,
        at.queries,
        at.query_table,
        at.key_table,
        () if isinstance(inputs.earlier, tuple) else at.queries,
    )
    adds = in_specs.earlier is at.queries
    return pl.pallas_call(
        functools.partial(
            kernel, blocks=blocks, window=window, softcap=softcap, segmented=segmented
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(K, listed.count),
            in_specs=[in_specs],
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
            jax.ShapeDtypeStruct((B, K, G, T, H), jnp.float32 if adds else dtype),
            jax.ShapeDtypeStruct((B, K, S, H), dtype),
            jax.ShapeDtypeStruct((B, K, S, H), dtype),
        ],
        input_output_aliases={4 + len(jax.tree.leaves(inputs)): 0} if adds else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        interpret=interpret,
        name='helios_attention_backward',
    )(*listed[:-1], scale, inputs)


def block(x: Any, payload: Any, exponents: Any) -> Any:
    """The block spec of q, k or v."""
    return Stored(payload, exponents) if isinstance(x, Stored) else payload


def turned(x: Any, head: int | None = None) -> Array:
    """A block, or one head's of queries, as float32 [H n]."""
    at: Any = ... if head is None else head
    if not isinstance(x, Stored):
        return x[at].T.astype(jnp.float32)
    scales = power_of_two(x.exponents[...].astype(jnp.int32))
    row = scales if head is None else scales[head : head + 1]
    return x.payload[at].astype(jnp.float32).T * row


def kernel(
    queries: Any, keys: Any, writes: Any, parts: Any, scale: Any,
    x: Inputs, dq_ref: Any, dk_ref: Any, dv_ref: Any,
    q_turned: Any, cotangent: Any, k_turned: Any, k_upright: Any, v_upright: Any,
    marks: Any, lse: Any, delta: Any, dq: Any, dk: Any, dv: Any,
    *, blocks: Blocks, window: int, softcap: float, segmented: bool,
) -> None:  # fmt: skip
    del queries, writes  # the index maps read them
    G, bq, H = dq_ref.shape
    item = pl.program_id(1)
    flags = parts[item]
    j = high(keys[item])
    first_key = pl.multiple_of(j * blocks.k, blocks.k)
    block = pl.ds(first_key, blocks.k)

    @pl.when(flags & work.FIRST_Q != 0)
    def _() -> None:
        for g in range(G):
            at = slice(g * bq, (g + 1) * bq)
            q = rotate(turned(x.q, g), x.q_table) * scale[0]
            q_turned[:, at] = q.astype(q_turned.dtype)
            cotangent[:, at] = x.cotangent[g].T
            marks[:, at] = x.q_table[H:]
            product = cotangent[:, at].astype(jnp.float32) * x.out[g].T.astype(jnp.float32)
            delta[:, at] = jnp.sum(product, axis=0, keepdims=True)
            # A query that saw nothing has −∞ here; from +10³⁰ its weights come out as zero.
            seen = x.lse[g : g + 1] > MASKED
            lse[:, at] = jnp.where(seen, x.lse[g : g + 1] * LOG2E, -MASKED)
        dq[...] = jnp.zeros_like(dq)

    @pl.when(flags & work.FIRST_K != 0)
    def _() -> None:
        k = rotate(turned(x.k), x.k_table).astype(k_turned.dtype)
        k_turned[j] = k
        k_upright[block] = k.T
        stored = isinstance(x.v, Stored)
        v_upright[block] = turned(x.v).astype(v_upright.dtype).T if stored else x.v[...]
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
                rows = x.k_table[H : H + 2, part]
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

    walk(flags, blocks, attend)

    @pl.when(flags & work.LAST_Q != 0)
    def _() -> None:
        for g in range(G):
            # q came in scaled by `scale`, which has log₂e in it; the logits' gradient is natural.
            gradient = rotate(dq[:, g * bq : (g + 1) * bq], x.q_table, -1) * (scale[0] / LOG2E)
            before = 0 if isinstance(x.earlier, tuple) else x.earlier[g]
            dq_ref[g] = (gradient.T + before).astype(dq_ref.dtype)

    @pl.when(flags & work.LAST_K != 0)
    def _() -> None:
        dk_ref[...] = rotate(dk[block].T / LOG2E, x.k_table, -1).T.astype(dk_ref.dtype)
        dv_ref[...] = dv[block].astype(dv_ref.dtype)
