"""Makes our kernels candidates."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from helios_jax.bench.moe.problem import ROWS, WEIGHTS, Candidate, Problem
from helios_jax.chips import CHIPS
from helios_jax.kernels.grouped_matmul import tpu
from helios_jax.kernels.grouped_matmul.tpu import gradient_kernel, multiply_kernel, tiles, work
from helios_jax.kernels.grouped_matmul.tpu.tiles import GradientTiles, MultiplyTiles
from helios_jax.plan.compiler.timing import HALF, Visits, changes, tally

Options = dict[str, Any]


def variants(problem: Problem, product: str, target: str) -> list[Options]:
    """Lists the tiles that the kernels take, alone."""
    at = problem.num_rows, problem.embed_dim, problem.expert_dim, problem.experts
    M, D, F, E = at
    if product == WEIGHTS:
        return [{'tiles': tiles.for_gradient(target, M, D, F, E, HALF)}]
    depth, width = (F, D) if product == ROWS else (D, F)
    return [{'tiles': tiles.for_multiply(target, M, depth, width, E, HALF, product == ROWS)}]


def candidate(problem: Problem, product: str, options: Options, target: str) -> Candidate:
    """Makes a product of ours with the tiles of the options."""
    if product == WEIGHTS:
        chosen = GradientTiles(*map(hashable, options['tiles']))
        function = lambda x, y, sizes: tpu.weight_gradient(x, y, sizes, chosen=chosen)
        found = gradient_visits(problem, chosen, CHIPS[target].num_cores)
        return Candidate(function, gradient_kernel.NAME, found)
    chosen = MultiplyTiles(*map(hashable, options['tiles']))
    function = lambda x, w, sizes: tpu.multiply(
        x, w, sizes, transposed=product == ROWS, chosen=chosen
    )
    found = multiply_visits(problem, product, chosen, CHIPS[target].num_cores)
    return Candidate(function, multiply_kernel.NAME, found)


def multiply_visits(
    problem: Problem, product: str, chosen: MultiplyTiles, num_cores: int
) -> Visits:
    """Counts what the kernel runs and copies, for the core with the most blocks of columns."""
    D, F = problem.embed_dim, problem.expert_dim
    depth, width = (F, D) if product == ROWS else (D, F)
    listed = work.of_tiles(jnp.asarray(problem.group_sizes), problem.num_rows, chosen.rows)
    items = work.Items(*(np.asarray(x)[: int(listed.count)] for x in listed.items))
    some = items.begin < items.end
    whole = (items.begin == 0) & (items.end == chosen.rows)
    runs = {'blank': changes(items.tile) * ~whole}
    for size, step, times in each(chosen, items):
        runs[size] = times * (chosen.columns // step)
    moved = changes(items.tile) * chosen.rows * (depth + chosen.columns)
    moved = moved + some * shared(items) * depth * chosen.columns
    return tally(runs, HALF * moved, in_turns(width // chosen.columns, num_cores))


def gradient_visits(problem: Problem, chosen: GradientTiles, num_cores: int) -> Visits:
    """Counts what the kernel runs and copies, for the core with the most blocks."""
    listed = work.of_groups(jnp.asarray(problem.group_sizes), problem.num_rows, chosen.rows)
    items = work.Items(*(np.asarray(x)[: int(listed.count)] for x in listed.items))
    runs = {'empty': items.begin == items.end}
    for size, step, times in each(chosen, items):
        runs[size] = times * (chosen.height // step)
    moved = changes(items.tile) * chosen.rows * (chosen.height + chosen.width)
    moved = HALF * (moved + shared(items) * chosen.height * chosen.width)
    blocks = -(-problem.embed_dim // chosen.height) * -(-problem.expert_dim // chosen.width)
    return tally(runs, moved, in_turns(blocks, num_cores))


def shared(items: work.Items) -> np.ndarray:
    """Share of each item in what is copied once a group, while another is worked on."""
    _, at, counts = np.unique(items.group, return_inverse=True, return_counts=True)
    return 1 / counts[at]


def each(chosen: Any, items: work.Items) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields the name of each product, its step, and how often items run it for all steps."""
    counts = work.runs(items.begin, items.end, chosen.sizes)
    for size, step, times in zip(chosen.sizes, chosen.steps, counts, strict=True):
        yield f'product/{size}', step, times


def hashable(value: Any) -> Any:
    """Undoes what JSON makes of a tuple."""
    return tuple(value) if isinstance(value, list) else value


def in_turns(blocks: int, num_cores: int) -> int:
    """Counts blocks as if each core had as many as the busiest; a single one has one core."""
    return -(-blocks // num_cores) * num_cores if blocks > 1 else 1
