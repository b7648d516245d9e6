"""Makes our kernels candidates."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from helios_jax.bench.moe.problem import ROWS, WEIGHTS, GroupedCandidate, GroupedProblem
from helios_jax.chips import CHIPS
from helios_jax.kernels.grouped_matmul import tpu
from helios_jax.kernels.grouped_matmul.tpu import gradient_kernel, multiply_kernel, tiles, work
from helios_jax.kernels.grouped_matmul.tpu.tiles import GradientTiles, MultiplyTiles
from helios_jax.kernels.grouped_matmul.tpu.work import GroupWork
from helios_jax.plan.compiler.timing import HALF, changes, tally

Options = dict[str, Any]


def variants(problem: GroupedProblem, product: str, target: str) -> list[Options]:
    """Lists the tiles that the kernels take, alone."""
    M, E, D, F = problem.num_rows, problem.experts, problem.embed_dim, problem.expert_dim
    if product == WEIGHTS:
        return [{'tiles': tiles.for_gradient(target, M, D, F, E, HALF)}]
    depth, width = (F, D) if product == ROWS else (D, F)
    return [{'tiles': tiles.for_multiply(target, M, depth, width, E, HALF, product == ROWS)}]


def candidate(
    problem: GroupedProblem, product: str, options: Options, target: str
) -> GroupedCandidate:
    """Makes a product of ours with the tiles of the options."""
    cores = CHIPS[target].num_cores
    # JSON makes lists of tuples.
    fields: Any = [tuple(x) if isinstance(x, list) else x for x in options['tiles']]
    if product == WEIGHTS:
        return gradient_candidate(problem, GradientTiles(*fields), cores)
    return multiply_candidate(problem, product, MultiplyTiles(*fields), cores)


def multiply_candidate(
    problem: GroupedProblem, product: str, chosen: MultiplyTiles, num_cores: int
) -> GroupedCandidate:
    """Makes a product by weights; counts for the core with the most blocks of columns."""

    def function(x: Any, weights: Any, sizes: Any) -> Any:
        return tpu.multiply(x, weights, sizes, transposed=product == ROWS, chosen=chosen)

    D, F = problem.embed_dim, problem.expert_dim
    depth, width = (F, D) if product == ROWS else (D, F)
    sizes = jnp.asarray(problem.group_sizes)
    group, tile, begin, end = arrays(work.of_tiles(sizes, problem.num_rows, chosen.rows))
    whole = (begin == 0) & (end == chosen.rows)
    runs = {'blank': changes(tile) * ~whole}
    runs |= products(chosen.sizes, chosen.steps, chosen.columns, begin, end)
    moved = changes(tile) * chosen.rows * (depth + chosen.columns)
    moved = moved + shared(group, end - begin) * depth * chosen.columns
    visits = tally(runs, HALF * moved, in_turns(width // chosen.columns, num_cores))
    return GroupedCandidate(function, multiply_kernel.NAME, visits)


def gradient_candidate(
    problem: GroupedProblem, chosen: GradientTiles, num_cores: int
) -> GroupedCandidate:
    """Makes the gradient of the weights; counts for the core with the most blocks."""

    def function(x: Any, gradient: Any, sizes: Any) -> Any:
        return tpu.weight_gradient(x, gradient, sizes, chosen=chosen)

    sizes = jnp.asarray(problem.group_sizes)
    group, tile, begin, end = arrays(work.of_groups(sizes, problem.num_rows, chosen.rows))
    runs = {'empty': begin == end}
    runs |= products(chosen.sizes, chosen.steps, chosen.height, begin, end)
    moved = changes(tile) * chosen.rows * (chosen.height + chosen.width)
    moved = moved + shared(group, np.maximum(end - begin, 1)) * chosen.height * chosen.width
    blocks = -(-problem.embed_dim // chosen.height) * -(-problem.expert_dim // chosen.width)
    visits = tally(runs, HALF * moved, in_turns(blocks, num_cores))
    return GroupedCandidate(function, gradient_kernel.NAME, visits)


def arrays(listed: GroupWork) -> Iterator[np.ndarray]:
    """Yields the fields of the items that are run."""
    return (np.asarray(field)[: int(listed.length)] for field in listed.items)


def products(
    sizes: tuple[int, ...], steps: tuple[int, ...], whole: int, begin: np.ndarray, end: np.ndarray
) -> dict[str, np.ndarray]:
    """Counts how often items run the products of each size, for all steps of the whole."""
    counts = zip(sizes, steps, work.runs(begin, end, sizes), strict=True)
    return {f'product/{size}': times * (whole // step) for size, step, times in counts}


def shared(group: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Share of each item in what is copied once a group, while another is worked on."""
    _, at = np.unique(group, return_inverse=True)
    return rows / np.maximum(np.bincount(at, rows), 1)[at]


def in_turns(blocks: int, num_cores: int) -> int:
    """Counts blocks as if each core had as many as the busiest; a single one has one core."""
    return -(-blocks // num_cores) * num_cores if blocks > 1 else 1
