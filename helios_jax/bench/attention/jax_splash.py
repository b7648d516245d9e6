"""Splash attention as the bench's peers have it, and jax's version of it.

With the block sizes and options to try, rotated as kernels.attention.rotation does, in the layout
[B N T H] that their kernels take. How often their regions run follows from the tables that they
hand to their own kernels, step by step. tokamax's version is in attention_tokamax.py.
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

from helios_jax.bench.attention_problem import Problem, Setup, frequencies
from helios_jax.bench.tpu_timing import Plan, Step
from helios_jax.kernels.attention.rotation import rotate

Options = dict[str, Any]
LANES = 128  # copies of a number that a peer keeps per query: log-sum-exp, segment id, position
SUBLANES = 8  # the same, where queries lie along the lanes
FLOAT, HALF = 4, 2  # bytes


def variants(problem: Problem, which: str, _: str) -> list[Options]:
    """Block sizes; backward in two kernels, or in one that keeps a dq for each key block."""
    if which == 'forward':
        return block_sizes(problem, [(512, 512), (1024, 512), (2048, 512)])
    return [
        sizes | {'fused': fused}
        for sizes in block_sizes(problem, [(512, 512), (1024, 512)])
        for fused in (False, True)
    ]


def block_sizes(problem: Problem, sizes: list[tuple[int, int]]) -> list[Options]:
    """Of blocks in memory and in the products, those that are worth a try.

    That is 1024; small ones where they leave out more, large ones in long rows.
    """
    T, sparse = problem.length, problem.documents > 1 or problem.window > 0
    useful = {512: sparse or T < 4096 or T % 1024 > 0, 1024: True, 2048: T >= 8192}
    worth = [
        {'block': block, 'compute': compute}
        for block, compute in sizes
        if T % block == 0 and useful[block]
    ]
    # The largest need more VMEM than an operation gets unasked.
    return [o | {'scoped_vmem_mib': 48} if o['block'] > 1024 else o for o in worth]


def setup(problem: Problem, options: Options) -> Setup:
    block, fused = options['block'], options.get('fused', False)
    T, N = problem.length, problem.heads
    shape, sides = (T, T), (problem.window - 1, 0)
    mask = masks.LocalMask(shape, sides, 0) if problem.window else masks.CausalMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=options['compute'],
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=options['compute'],
            block_q_dq=None if fused else block,
            block_kv_dq=None if fused else block,
            use_fused_bwd_kernel=fused,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    packed = problem.documents > 1
    name = 'splash_mha_{}' + ('_segmented' if packed else '')
    plans = {
        name.format('fwd'): _jax_rows(problem, block, kernel.fwd_mask_info, lse_written=True),
        name.format('dkv'): _jax_columns(problem, block, kernel.dkv_mask_info, fused),
    }
    if not fused:
        plans[name.format('dq')] = _jax_rows(problem, block, kernel.dq_mask_info, lse_written=False)
    return Setup(rotated_attention(problem, kernel, splash.SegmentIds), 'bnth', plans)


def _jax_rows(problem: Problem, block: int, info: Any, *, lse_written: bool) -> Plan:
    """The kernels that visit the key blocks of a query block: forward, and dq."""
    state, column = np.asarray(info.block_mask)[0], np.asarray(info.data_next)[0]
    rows, width = state.shape
    N, H = problem.heads, problem.head_dim
    head, row, at = (x.ravel() for x in np.indices((N, rows, width)))
    column, state = column[row, at], state[row, at]
    key_head = head * problem.kv_heads // N
    runs = {'init': at == 0, 'run': state > 0, 'finish': at == width - 1}
    tile = block * H * HALF
    moved = 2 * tile * changes(key_head, column)
    # The positions of the queries, and their segments where there are several; out or dq.
    per_query = LANES * FLOAT if lse_written else SUBLANES * FLOAT
    moved += block * per_query * changes(row)
    moved += 2 * tile * changes(head, row)
    if lse_written:
        moved += block * LANES * FLOAT * changes(head, row)
    else:  # the output's cotangent, log-sum-exp, delta
        moved += (tile + 2 * block * SUBLANES * FLOAT) * changes(head, row)
    if problem.documents > 1:
        moved += block * per_query * changes(row) + block * SUBLANES * FLOAT * changes(column)
    return plan(runs, moved, problem.batch)


def _jax_columns(problem: Problem, block: int, info: Any, fused: bool) -> Plan:
    """The kernel that visits the query blocks of a key block: dk, dv and, if fused, dq."""
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
    return plan(runs, moved, problem.batch)


def rotated_attention(
    problem: Problem, kernel: Any, ids: Callable[..., Any]
) -> Callable[..., Array]:
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


def changes(*indices: np.ndarray) -> np.ndarray:
    """1 for each step whose block is another than the step's before: the block is copied."""
    stacked = np.stack(indices)
    moved = np.any(stacked[:, 1:] != stacked[:, :-1], axis=0)
    return np.concatenate([[1], moved.astype(int)])


def plan(runs: dict[str, np.ndarray], hbm_bytes: np.ndarray, batch: int) -> Plan:
    """Gathers like steps, for all rows of the batch.

    Args:
      runs: for each body, in the order of the code, how often it runs in each step of one row.
      hbm_bytes: that each step copies.
    """
    table = np.stack([*runs.values(), hbm_bytes], axis=1).astype(np.int64)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    steps = [
        Step(float(count) * batch, dict(zip(runs, map(float, kind), strict=False)), float(kind[-1]))
        for kind, count in zip(kinds, counts, strict=True)
    ]
    return Plan(tuple(runs), steps)
