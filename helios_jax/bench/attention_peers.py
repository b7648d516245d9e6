"""The peers: jax's splash attention, and tokamax's (the extra `bench`), set up for a problem.

Each with the block sizes and options to try, rotated as kernels.attention.rotation does, in the
layout [B N T H] that their kernels take. How often their regions run follows from the tables that
they hand to their own kernels, step by step.
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
from helios_jax.bench.tpu_schedule import Plan, Step
from helios_jax.errors import UserError
from helios_jax.kernels.attention.rotation import rotate

Options = dict[str, Any]
LANES = 128  # copies of a number that a peer keeps per query: log-sum-exp, segment id, position
SUBLANES = 8  # the same, where queries lie along the lanes
FLOAT, HALF = 4, 2  # bytes


def jax_splash_options(problem: Problem, which: str) -> list[Options]:
    """Blocks in memory and in the products; backward in two kernels, or one that keeps each dq."""
    if which == 'forward':
        sizes = (512, 512), (1024, 512), (2048, 512)
        return _that_fit(problem, [{'block': b, 'compute': c} for b, c in sizes])
    sizes = (512, 512), (1024, 512)
    return _that_fit(
        problem,
        [{'block': b, 'compute': c, 'fused': fused} for b, c in sizes for fused in (False, True)],
    )


def _that_fit(problem: Problem, options: list[Options]) -> list[Options]:
    """Blocks that divide T; the largest need more VMEM than an operation gets unasked."""
    fitting = [o for o in options if problem.length % o['block'] == 0]
    return [o | {'scoped_vmem_mib': 32} if o['block'] > 1024 else o for o in fitting]


def jax_splash(problem: Problem, options: Options) -> Setup:
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
    return Setup(_attend(problem, kernel, splash.SegmentIds), 'bnth', plans)


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


def tokamax_options(problem: Problem, which: str) -> list[Options]:
    """Blocks in memory and in the products; the diagonal's upper half skipped; dq by threes."""
    skip = not problem.window
    if which == 'forward':
        sizes = (512, 512), (1024, 512), (1024, 1024), (2048, 512), (2048, 2048)
        return _that_fit(
            problem,
            [{'block': b, 'compute': c, 'diagonal_skip': skip and b == c} for b, c in sizes],
        )
    # Packed rows take the dynamic grid whatever is asked for.
    grids = (True,) if problem.documents > 1 else (False, True)
    return _that_fit(
        problem,
        [
            {'block': 1024, 'compute': c, 'diagonal_skip': skip and c == 1024, 'dynamic': dynamic}
            for dynamic in grids
            for c in (512, 1024)
        ],
    )


def tokamax(problem: Problem, options: Options) -> Setup:
    """Raises: UserError: tokamax is not installed."""
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel as kernels,
        )
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_mask as tokamax_masks,
        )
    except ImportError as error:
        raise UserError(
            f"the peer tokamax cannot be imported ({error}); pip install 'helios_jax[bench]'."
        ) from error
    block, T = options['block'], problem.length
    shape, sides = (T, T), (problem.window - 1, 0)
    kernel = kernels.make_splash_mha(
        tokamax_masks.LocalMask(shape, sides, 0)
        if problem.window
        else tokamax_masks.CausalMask(shape),
        config=kernels.SplashConfig(
            block_q=block,
            block_kv=block,
            block_kv_compute=options['compute'],
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=options['compute'],
            qk_diag_skip=options['diagonal_skip'],
            sv_diag_skip=options['diagonal_skip'],
            dq_reduction_steps=3 if options.get('dynamic') else None,
        ),
        q_seq_shards=1,
    )
    forward, backward = kernel.fwd_mask_info, kernel.dkv_mask_info
    name = 'splash_mha_{}'
    if problem.documents > 1:
        name += '_segmented'
        forward, backward = (
            _with_segments(kernels, problem, info, block, is_dkv)
            for is_dkv, info in enumerate((forward, backward))
        )
    return Setup(
        _attend(problem, kernel, kernels.SegmentIds),
        'bnth',
        {
            name.format('fwd'): _tokamax_forward(problem, block, forward),
            name.format('dkv'): _tokamax_backward(problem, block, backward),
        },
    )


def _with_segments(kernels: Any, problem: Problem, info: Any, block: int, is_dkv: int) -> Any:
    """The steps that are left where segments do not meet; rows of a batch share one list."""
    blocks = problem.length // block

    def refine(ids: Array) -> Any:
        return kernels._refine_mask_info_with_segments(
            info,
            kernels.SegmentIds(ids, ids),
            q_blocks=blocks,
            kv_blocks=blocks,
            bq=block,
            bkv=block,
            is_dkv=bool(is_dkv),
        )[0]

    return jax.tree.map(lambda x: x[0], jax.vmap(refine)(jnp.asarray(problem.segment_ids)))


def _tokamax_forward(problem: Problem, block: int, info: Any) -> Plan:
    row, column, state, head = _listed(problem, info)
    N, H = problem.heads, problem.head_dim
    key_head = head * problem.kv_heads // N
    first = changes(head, row)
    runs = {
        'init': first,
        'full': state == 2,
        'masked': state == 1,
        'finish': np.append(first[1:], True),
    }
    tile, numbers = block * H * HALF, block * LANES * FLOAT
    moved = 2 * tile * changes(key_head, column)
    moved += 2 * (tile + numbers) * first  # q, out; log-sum-exp, maximum
    moved += numbers * changes(row)  # positions
    if problem.documents > 1:
        moved += numbers * changes(row) + block * SUBLANES * FLOAT * changes(column)
    return plan(runs, moved, problem.batch)


def _tokamax_backward(problem: Problem, block: int, info: Any) -> Plan:
    N, G, H = problem.heads, problem.heads // problem.kv_heads, problem.head_dim
    blocks = problem.length // block
    tile, numbers = block * H * HALF, block * SUBLANES * FLOAT
    listed = info.active_rows is not None
    if listed:
        column, row, state, head = _listed(problem, info)
        first, last = changes(head, column), np.append(changes(head, column)[1:], True)
        summed = G > 1 and blocks > 2
        runs = {'init': first, 'full': state == 2, 'masked': state == 1}
        if summed:
            runs |= {'write': last & (head % G == 0), 'add': last & (head % G > 0)}
        else:
            runs['write'] = last
        # dq is read and written; so are dk and dv, in float32, where heads add to them.
        moved = 2 * tile * np.ones_like(row)
        width = 2 * FLOAT if summed else FLOAT if G > 1 else HALF
        moved += 2 * block * H * width * first
    else:
        column, head, row = (x.ravel() for x in np.indices((blocks, N, blocks)))
        state = np.asarray(info.block_mask).reshape(blocks, blocks)[column, row]
        in_last = (row == blocks - 1) | (blocks <= 2)
        runs = {
            'init': (row == 0) & (head % G == 0),
            'full': state == 2,
            'masked': state == 1,
            'write': in_last & (head % G == G - 1),
        }
        width = HALF if blocks <= 4 else FLOAT
        moved = block * H * width * np.ones_like(row)  # each step has a dq of its own
        moved += 2 * tile * changes(column, head // G)  # dk, dv
    moved += 2 * tile * changes(column, head // G)  # k, v
    moved += 2 * (tile + numbers) * changes(head, row)  # q, cotangent; log-sum-exp, delta
    moved += numbers * changes(row)
    if problem.documents > 1:
        moved += numbers * changes(row) + block * LANES * FLOAT * changes(column)
    return plan(runs, moved, problem.batch)


def _listed(problem: Problem, info: Any) -> list[np.ndarray]:
    """Row, column, state (0 nothing, 1 masked, 2 full) and head of each step on tokamax's list."""
    count = int(info.num_active_blocks[0])
    one_head = (info.active_rows, info.active_cols, info.block_mask)
    lists = [np.tile(np.asarray(x)[:count].astype(int), problem.heads) for x in one_head]
    return [*lists, np.repeat(np.arange(problem.heads), count)]


def _attend(problem: Problem, kernel: Any, ids: Callable[..., Any]) -> Callable[..., Array]:
    scale = 1 / math.sqrt(problem.head_dim)
    turns = frequencies(problem)

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
