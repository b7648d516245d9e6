"""Makes jax's megablox candidates."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, make_group_metadata, tgmm

from helios_jax.bench.moe.problem import ROWS, WEIGHTS, GroupedCandidate, GroupedProblem
from helios_jax.chips import CHIPS
from helios_jax.plan.compiler.grouped_matmul import in_turns
from helios_jax.plan.compiler.timing import HALF, Visits, changes, tally

Options = dict[str, Any]
# Rows, contraction and columns of a tile; for the weights' gradient rows, D and F.
# The first is MaxText's default; the last leaves both cores of v5p a part of F 768.
TILINGS = ((512, 1024, 1024), (512, 2048, 1024), (512, 2048, 384))


def variants(problem: GroupedProblem, product: str, target: str) -> list[Options]:
    """Lists tilings, none larger than the problem, with as much VMEM as there is."""
    height, width = problem.embed_dim, problem.expert_dim
    if product == ROWS:
        height, width = width, height
    scoped = CHIPS[target].kernel_vmem_bytes // 2**20
    fitted = {(m, min(k, height), min(n, width)) for m, k, n in TILINGS}
    return [{'tiling': tiling, 'scoped_vmem_mib': scoped} for tiling in sorted(fitted)]


def candidate(
    problem: GroupedProblem, product: str, options: Options, target: str
) -> GroupedCandidate:
    """Makes a product of megablox with a tiling of `variants`."""
    tiling, cores = tuple(options['tiling']), CHIPS[target].num_cores
    if product == WEIGHTS:
        gradient = lambda x, y, sizes: tgmm(x.T, y, sizes, jnp.bfloat16, tiling)
        return GroupedCandidate(gradient, 'tgmm', gradient_visits(problem, tiling, cores))
    multiply = lambda x, w, sizes: gmm(
        x, w, sizes, jnp.bfloat16, tiling, transpose_rhs=product == ROWS
    )
    return GroupedCandidate(multiply, 'gmm', multiply_visits(problem, product, tiling, cores))


def listed(problem: GroupedProblem, rows: int, empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """Group and tile of each grid step, as megablox lists them."""
    (_, groups, tiles), count = make_group_metadata(
        group_sizes=jnp.asarray(problem.group_sizes),
        m=problem.num_rows,
        tm=rows,
        start_group=jnp.int32(0),
        num_nonzero_groups=problem.experts,
        visit_empty_groups=empty,
    )
    return np.asarray(groups)[: int(count)], np.asarray(tiles)[: int(count)]


def multiply_visits(problem: GroupedProblem, product: str, tiling: tuple, num_cores: int) -> Visits:
    """Counts what the kernel runs and copies: blocks of the contraction turn fastest."""
    rows, k, n = tiling
    depth, width = problem.embed_dim, problem.expert_dim
    if product == ROWS:
        depth, width = width, depth
    groups, tiles = (np.repeat(x, -(-depth // k)) for x in listed(problem, rows, False))
    at = np.tile(np.arange(-(-depth // k)), len(groups) // -(-depth // k))
    last = at == at.max()
    runs = {'zero': at == 0, 'last': last, 'not_last': ~last}
    if depth <= k:  # all is one body
        runs = {'product': last}
    moved = changes(tiles, at) * rows * k + changes(groups, at) * k * n + changes(tiles) * rows * n
    return tally(runs, HALF * moved, in_turns(-(-width // n), num_cores))


def gradient_visits(problem: GroupedProblem, tiling: tuple, num_cores: int) -> Visits:
    """Counts what the kernel runs and copies; cores share blocks along F."""
    rows, k, n = tiling
    groups, tiles = listed(problem, rows, True)
    begins, ends = changes(groups), np.append(changes(groups)[1:], 1)
    runs = {'zero': begins, 'product': np.ones_like(begins), 'store': ends}
    moved = changes(tiles) * rows * (k + n) + begins * k * n
    turns = in_turns(-(-problem.expert_dim // n), num_cores)
    return tally(runs, HALF * moved, turns * -(-problem.embed_dim // k))
