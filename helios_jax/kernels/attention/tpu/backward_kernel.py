"""The backward kernel: dq, dk and dv in one pass over the listed blocks.

Logits are [keys, queries], so that a number of each query, such as its log-sum-exp, is a row.

work.py tells the life of a work item. The order is the forward kernel's: blocks of keys within
blocks of queries. dq of a block of queries lies in VMEM until its keys are through; dk and dv of
all keys of a head, for a group of query heads together, until the last queries that see them. Only
finished gradients are written, unrotated.
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
    cost,
    dot,
    rotate,
    spread,
    visible,
    walk,
)
from helios_jax.kernels.attention.tpu.work import Blocks, Items, Work
from helios_jax.kernels.quantize import Stored, power_of_two


def keys_in_memory(out: Any, blocks: Blocks, vmem: int, in_chunks: bool = False) -> int:
    """Counts the most keys of a head, in whole blocks, whose copies and gradients fit VMEM.

    Args:
      out: [B K G T H], in the dtype of q, k and v.
      in_chunks: True if there are more keys than fit.
    """
    G, H, itemsize = out.shape[2], out.shape[-1], out.dtype.itemsize
    lanes = max(H, LANES)
    each = 2 * 4 * lanes + (2 * lanes + H) * itemsize
    free = vmem - working_set(blocks, G, H, itemsize, True, in_chunks)
    return max(free // each // blocks.k, 1) * blocks.k


class BackwardInputs(NamedTuple):
    """Inputs of the kernel: arrays, their block specs, or references to blocks.

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


class BackwardOutputs(NamedTuple):
    """Outputs of the kernel: shapes, block specs, references to blocks, or arrays."""

    dq: Any  # [B K G T H]
    dk: Any  # [B K S H]
    dv: Any


class BackwardScratch(NamedTuple):
    """Buffers in VMEM that live across items. A row is a query of one of the G heads."""

    q_turned: Ref  # [H G·q], rotated and scaled
    cotangent: Ref  # [H G·q]
    k_turned: Ref  # [blocks of keys, H, k], rotated
    k_upright: Ref  # [S H], rotated
    v_upright: Ref  # [S H]
    q_marks: Ref  # float32 [MARKS G·q]: segment and position of each row
    lse: Ref  # float32 [1 G·q], in base 2
    delta: Ref  # float32 [1 G·q]: Σ out · cotangent
    dq: Ref  # float32 [H G·q]
    dk: Ref  # float32 [S H]
    dv: Ref  # float32 [S H]


def backward(
    x: BackwardInputs,
    scale: Array,
    listed: Work,
    static: Static,
    vmem: int,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Returns dq [B K G T H], dk and dv [B K S H], unrotated. Arguments are `forward`'s."""
    B, K, G, T, H = x.out.shape
    S, blocks = x.k_table.shape[-1], static.blocks
    width, dtype = G * blocks.q, x.out.dtype
    q, k, v = (a._replace(payload=a.values) if isinstance(a, Stored) else a for a in x[:3])
    x = x._replace(q=q, k=k, v=v)
    at = specs(x.out, static)
    tile = functools.partial(pltpu.VMEM, dtype=dtype)
    total = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    in_specs = BackwardInputs(
        block(x.q, at.queries, at.rows),
        block(x.k, at.begun_keys, at.begun_rows),
        block(x.v, at.begun_keys, at.begun_rows),
        at.queries,
        at.rows,
        at.queries,
        at.query_table,
        at.key_table,
        () if isinstance(x.earlier, tuple) else at.queries,
    )
    adds = in_specs.earlier is at.queries
    keys = jax.ShapeDtypeStruct((B, K, S, H), dtype)
    dq = jax.ShapeDtypeStruct((B, K, G, T, H), jnp.float32 if adds else dtype)
    # A pytree alone would be taken apart: the kernel gets each in one piece, out of a tuple of one.
    (y,) = pl.pallas_call(
        functools.partial(kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(K, listed.count),
            in_specs=(in_specs,),
            out_specs=(BackwardOutputs(at.queries, at.finished_keys, at.finished_keys),),
            scratch_shapes=(
                BackwardScratch(
                    q_turned=tile((H, width)),
                    cotangent=tile((H, width)),
                    k_turned=tile((S // blocks.k, H, blocks.k)),
                    k_upright=tile((S, H)),
                    v_upright=tile((S, H)),
                    q_marks=total((MARKS, width)),
                    lse=total((1, width)),
                    delta=total((1, width)),
                    dq=total((H, width)),
                    dk=total((S, H)),
                    dv=total((S, H)),
                ),
            ),
        ),
        out_shape=(BackwardOutputs(dq, keys, keys),),
        # Counted in arrays: the words, the scale, and `earlier`, the last of the inputs.
        input_output_aliases=({len(listed.items) + len(jax.tree.leaves(x)): 0} if adds else {}),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=vmem
        ),
        cost_estimate=cost(x.out.shape, S, static.window, 5, (x, dq, keys, keys)),
        interpret=interpret,
        name='helios_attention_backward',
    )(listed.items, scale, x)
    return y


def block(x: Any, payload: Any, exponents: Any) -> Any:
    """Makes the block spec of q, k or v."""
    return Stored(payload, exponents) if isinstance(x, Stored) else payload


def turned(x: Any, head: int | None = None) -> Array:
    """Transposes a block, or one head's queries of it, to float32 [H n]."""
    at: Any = ... if head is None else head
    if not isinstance(x, Stored):
        return x[at].T.astype(jnp.float32)
    scales = power_of_two(x.exponents[...].astype(jnp.int32))
    row = scales if head is None else scales[head : head + 1]
    return x.payload[at].astype(jnp.float32).T * row


def kernel(
    static: Static,
    items: Items,
    scale: Ref,
    x: BackwardInputs,
    y: BackwardOutputs,
    scratch: BackwardScratch,
) -> None:
    """Runs one work item of one key head."""
    (G, bq, H), blocks, softcap = y.dq.shape, static.blocks, static.softcap
    q_turned, cotangent, k_turned, k_upright, v_upright, q_marks, lse, delta, dq, dk, dv = scratch
    item = pl.program_id(1)
    flags = items.strips[item]
    j = high(items.keys[item])
    first_key = pl.multiple_of(j * blocks.k, blocks.k)
    block = pl.ds(first_key, blocks.k)

    @pl.when(flags & work.FIRST_Q != 0)
    def _() -> None:
        for g in range(G):
            at = slice(g * bq, (g + 1) * bq)
            q = rotate(turned(x.q, g), x.q_table) * scale[0]
            q_turned[:, at] = q.astype(q_turned.dtype)
            cotangent[:, at] = x.cotangent[g].T
            q_marks[:, at] = x.q_table[H:]
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
        here = pl.ds(start, size)
        at = pl.ds(pl.multiple_of(first_key + start, size), size)
        for lane in range(0, G * bq, blocks.width):
            on = slice(lane, min(lane + blocks.width, G * bq))
            q, do = q_turned[:, on], cotangent[:, on]
            logits = capped(dot(k_upright[at], q, (1, 0)), softcap)
            slope = 1 - jnp.square(logits / (softcap * LOG2E)) if softcap else None
            if masked:
                rows = x.k_table[H : H + 2, here]
                segment, position = (
                    spread(column(rows[i : i + 1]), logits.shape[1]) for i in (0, 1)
                )
                on_rows = q_marks[:1, on], q_marks[1:2, on]
                seen = visible(on_rows, (segment, position), static)
                logits = jnp.where(seen, logits, MASKED)
            weights = jnp.exp2(logits - lse[:, on])
            change = weights * (dot(v_upright[at], do, (1, 0)) - delta[:, on])
            if slope is not None:
                change = change * slope
            change = change.astype(q.dtype)
            dv[at] += dot(weights.astype(q.dtype), do, (1, 1))
            dk[at] += dot(change, q, (1, 1))
            dq[:, on] += dot(k_turned[j, :, here], change, (1, 0))

    walk(flags, blocks, attend)

    @pl.when(flags & work.LAST_Q != 0)
    def _() -> None:
        for g in range(G):
            # q came in scaled by `scale`, which has log₂e in it; the logits' gradient is natural.
            gradient = rotate(dq[:, g * bq : (g + 1) * bq], x.q_table, -1) * (scale[0] / LOG2E)
            before = 0 if isinstance(x.earlier, tuple) else x.earlier[g]
            y.dq[g] = (gradient.T + before).astype(y.dq.dtype)

    @pl.when(flags & work.LAST_K != 0)
    def _() -> None:
        y.dk[...] = rotate(dk[block].T / LOG2E, x.k_table, -1).T.astype(y.dk.dtype)
        y.dv[...] = dv[block].astype(y.dv.dtype)
