"""Makes tokamax's splash attention (the extra `bench`) a candidate, as jax_splash.py does jax's."""

import importlib.metadata
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from helios_jax.bench.attention.jax_splash import (
    LANES,
    SUBLANES,
    Options,
    block_arguments,
    block_sizes,
    rotated_attention,
)
from helios_jax.bench.attention.problem import Candidate, Problem
from helios_jax.plan.compiler.timing import FLOAT, HALF, Visits, changes, tally

VERSION = (0, 0, 17)  # older ones have other options


def missing() -> str:
    """Says why tokamax cannot be compiled, or ''."""
    try:
        version = importlib.metadata.version('tokamax')
    except importlib.metadata.PackageNotFoundError:
        version = 'none'
    numbers = tuple(int(x) for x in re.findall(r'\d+', version)[:3])
    if numbers >= VERSION:
        return ''
    wanted = '.'.join(map(str, VERSION))
    return f"tokamax: needs {wanted}, there is {version}; pip install 'helios_jax[bench]'."


def variants(problem: Problem, which: str, _: str) -> list[Options]:
    """Lists block sizes; products above the diagonal left out; dq for each key block, or three.

    The products can be left out where a block is multiplied whole.
    """
    sizes = [(512, 512), (1024, 512), (1024, 1024)]
    if which == 'forward':
        sizes.append((2048, 2048))
    found = [
        o | {'diagonal_skip': o['block'] == o['compute'] and not problem.window}
        for o in block_sizes(problem, sizes)
    ]
    if which == 'forward':
        return found
    # Packed rows take the dynamic grid whatever is asked for.
    grids = (True,) if problem.documents > 1 else (False, True)
    return [o | {'dynamic': dynamic} for o in found for dynamic in grids]


def candidate(problem: Problem, options: Options) -> Candidate:
    """Makes tokamax's splash attention with one of the options of `variants`."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_mask as tokamax_masks,
    )

    block, T = options['block'], problem.length
    shape, sides = (T, T), (problem.window - 1, 0)
    kernel = kernels.make_splash_mha(
        tokamax_masks.LocalMask(shape, sides, 0)
        if problem.window
        else tokamax_masks.CausalMask(shape),
        config=kernels.SplashConfig(
            **block_arguments(options),
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
    return Candidate(
        rotated_attention(problem, kernel, kernels.SegmentIds),
        'bnth',
        {
            name.format('fwd'): _forward(problem, block, forward),
            name.format('dkv'): _backward(problem, block, backward),
        },
    )


def _with_segments(kernels: Any, problem: Problem, info: Any, block: int, is_dkv: int) -> Any:
    """Lists the steps left where segments meet; the rows of a batch share one list."""
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


def _forward(problem: Problem, block: int, info: Any) -> Visits:
    """Counts visits of the forward kernel."""
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
    return tally(runs, moved, problem.batch)


def _backward(problem: Problem, block: int, info: Any) -> Visits:
    """Counts visits of the backward kernel, on a dynamic grid (`info` lists it) or a static one."""
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
    return tally(runs, moved, problem.batch)


def _listed(problem: Problem, info: Any) -> list[np.ndarray]:
    """Reads row, column, state (0 nothing, 1 masked, 2 full) and head of each step of tokamax."""
    count = int(info.num_active_blocks[0])
    one_head = (info.active_rows, info.active_cols, info.block_mask)
    lists = [np.tile(np.asarray(x)[:count].astype(int), problem.heads) for x in one_head]
    return [*lists, np.repeat(np.arange(problem.heads), count)]
