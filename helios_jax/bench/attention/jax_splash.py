"""Makes jax's splash attention a candidate, and holds what tokamax's (tokamax.py) shares with it.

kernels.attention.rotation rotates queries and keys, in the layout [B N T H] that the peers' kernels
take. How often their regions run follows from the tables that the peers hand to their own kernels,
step by step.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from helios_jax.bench.attention.problem import Candidate, Problem, frequencies
from helios_jax.kernels.attention.rotation import rotate
from helios_jax.plan.compiler.timing import FLOAT, HALF, Visits, changes, tally

Options = dict[str, Any]
LANES = 128  # copies of a number that a peer keeps per query: log-sum-exp, segment id, position
SUBLANES = 8  # copies of it where queries lie along the lanes


def variants(problem: Problem, which: str, _: str) -> list[Options]:
    """Lists block sizes; backward in two kernels, or one that keeps a dq for each key block."""
    if which == 'forward':
        return block_sizes(problem, [(512, 512), (1024, 512), (2048, 512)])
    return [
        sizes | {'fused': fused}
        for sizes in block_sizes(problem, [(512, 512), (1024, 512)])
        for fused in (False, True)
    ]


def block_sizes(problem: Problem, sizes: list[tuple[int, int]]) -> list[Options]:
    """Keeps the sizes (block in memory, block in the products) that are worth a try.

    Blocks of 1024 always are, smaller ones where they leave out more, larger ones in long rows.
    """
    T, sparse = problem.length, problem.documents > 1 or problem.window > 0
    useful = {512: sparse or T < 4096 or T % 1024 > 0, 1024: True, 2048: T >= 8192}
    worth = [
        {'block': block, 'compute': compute}
        for block, compute in sizes
        if T % block == 0 and useful[block]
    ]
    # The largest need more VMEM than an operation gets by default.
    return [o | {'scoped_vmem_mib': 48} if o['block'] > 1024 else o for o in worth]


def block_arguments(options: Options) -> dict[str, Any]:
    """Names the blocks of the forward and the dk, dv kernel as both peers do."""
    block, compute = options['block'], options['compute']
    sides = {'block_q': block, 'block_kv': block, 'block_kv_compute': compute}
    return sides | {'block_q_dkv': block, 'block_kv_dkv': block, 'block_kv_dkv_compute': compute}


def candidate(problem: Problem, options: Options) -> Candidate:
    """Makes jax's splash attention with one of the options of `variants`."""
    block, fused = options['block'], options.get('fused', False)
    T, N = problem.length, problem.heads
    shape, sides = (T, T), (problem.window - 1, 0)
    mask = masks.LocalMask(shape, sides, 0) if problem.window else masks.CausalMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            **block_arguments(options),
            block_q_dq=None if fused else block,
            block_kv_dq=None if fused else block,
            use_fused_bwd_kernel=fused,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    packed = problem.documents > 1
    name = 'splash_mha_{}' + ('_segmented' if packed else '')
    visits = {
        name.format('fwd'): _row_visits(problem, block, kernel.fwd_mask_info, lse_written=True),
        name.format('dkv'): _column_visits(problem, block, kernel.dkv_mask_info, fused),
    }
    if not fused:
        visits[name.format('dq')] = _row_visits(
            problem, block, kernel.dq_mask_info, lse_written=False
        )
    return Candidate(rotated_attention(problem, kernel, splash.SegmentIds), 'bnth', visits)


def _row_visits(problem: Problem, block: int, info: Any, *, lse_written: bool) -> Visits:
    """Counts visits of the kernels that go through a query block's key blocks: forward, and dq."""
    state, column = np.asarray(info.block_mask)[0], np.asarray(info.data_next)[0]
    rows, width = state.shape
    N, H = problem.heads, problem.head_dim
    head, row, at = (x.ravel() for x in np.indices((N, rows, width)))
    column, state = column[row, at], state[row, at]
    key_head = head * problem.kv_heads // N
    runs = {'init': at == 0, 'run': state > 0, 'finish': at == width - 1}
    tile = block * H * HALF
    moved = 2 * tile * changes(key_head, column)
    # Positions of the queries; further down their segments, where there are several.
    per_query = LANES * FLOAT if lse_written else SUBLANES * FLOAT
    moved += block * per_query * changes(row)
    moved += 2 * tile * changes(head, row)  # q; out or dq
    if lse_written:
        moved += block * LANES * FLOAT * changes(head, row)
    else:  # the output's cotangent, log-sum-exp, delta
        moved += (tile + 2 * block * SUBLANES * FLOAT) * changes(head, row)
    if problem.documents > 1:
        moved += block * per_query * changes(row) + block * SUBLANES * FLOAT * changes(column)
    return tally(runs, moved, problem.batch)


def _column_visits(problem: Problem, block: int, info: Any, fused: bool) -> Visits:
    """Counts visits of the kernel that goes through a key block's query blocks: dk, dv (and dq)."""
    state, query = np.asarray(info.block_mask)[0], np.asarray(info.data_next)[0]
    width, columns = state.shape
    N, G, H = problem.heads, problem.heads // problem.kv_heads, problem.head_dim
    column, head, at = (x.ravel() for x in np.indices((columns, N, width)))
    row, state = query[at, column], state[at, column]
    runs = {
        'init': (at == 0) & (head % G == 0),
        'run': state > 0,
        'finish': (at == width - 1) & (head % G == G - 1),
    }
    tile, numbers = block * H * HALF, block * SUBLANES * FLOAT
    moved = 4 * tile * changes(column, head // G)  # k, v, dk, dv
    moved += 2 * (tile + numbers) * changes(head, row)  # q, cotangent; log-sum-exp, delta
    moved += numbers * changes(at)
    if fused:
        moved += tile * np.ones_like(moved)  # each step has a dq of its own
    if problem.documents > 1:
        moved += numbers * changes(at) + block * LANES * FLOAT * changes(column)
    return tally(runs, moved, problem.batch)


def rotated_attention(
    problem: Problem, kernel: Any, ids: Callable[..., Any]
) -> Callable[..., Array]:
    """Wraps a peer's kernel: rotates q and k, and hands it one row at a time.

    Args:
      ids: the peer's type of segment ids, made of the queries' and the keys'.
    """
    scale = 1 / math.sqrt(problem.head_dim)
    turns = jnp.asarray(frequencies(problem))

    def rotated(x: Array, positions: Array, scale: float) -> Array:
        return rotate(x.swapaxes(1, 2), positions, turns, scale).astype(x.dtype).swapaxes(1, 2)

    def attend(q: Array, k: Array, v: Array, positions: Array, segments: Array) -> Array:
        heads = rotated(q, positions, scale), rotated(k, positions, 1.0), v
        if problem.documents > 1:
            return jax.vmap(kernel)(*heads, ids(segments, segments))
        return jax.vmap(kernel)(*heads)

    return attend
