"""Makes our kernels candidates."""

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
    return [{'tiles': tiles.for_multiply(target, M, depth, width, E, HALF)}]


def candidate(problem: Problem, product: str, options: Options, target: str) -> Candidate:
    """Makes a product of ours with the tiles of the options."""
    if product == WEIGHTS:
        chosen = GradientTiles(*options['tiles'])
        function = lambda x, y, sizes: tpu.weight_gradient(x, y, sizes, chosen=chosen)
        found = gradient_visits(problem, chosen, CHIPS[target].num_cores)
        return Candidate(function, gradient_kernel.NAME, found)
    chosen = MultiplyTiles(*options['tiles'])
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
    whole, strips = shares(items, chosen.rows, chosen.strip)
    runs = {
        'whole': whole * (chosen.columns // chosen.whole_step),
        'blank': changes(items.tile) * ~whole,
        'strip': strips * (chosen.columns // chosen.strip_step),
    }
    moved = changes(items.tile) * chosen.rows * (depth + chosen.columns)
    moved = HALF * (moved + changes(items.group) * depth * chosen.columns)
    return tally(runs, moved, in_turns(-(-width // chosen.columns), num_cores))


def gradient_visits(problem: Problem, chosen: GradientTiles, num_cores: int) -> Visits:
    """Counts what the kernel runs and copies, for the core with the most blocks."""
    listed = work.of_groups(jnp.asarray(problem.group_sizes), problem.num_rows, chosen.rows)
    items = work.Items(*(np.asarray(x)[: int(listed.count)] for x in listed.items))
    whole, strips = shares(items, chosen.rows, chosen.strip)
    runs = {
        'empty': items.begin == items.end,
        'whole': whole * (chosen.height // chosen.whole_step),
        'strip': strips * (chosen.height // chosen.strip_step),
    }
    moved = changes(items.tile) * chosen.rows * (chosen.height + chosen.width)
    moved = HALF * (moved + changes(items.group) * chosen.height * chosen.width)
    blocks = -(-problem.embed_dim // chosen.height) * -(-problem.expert_dim // chosen.width)
    return tally(runs, moved, in_turns(blocks, num_cores))


def shares(items: work.Items, rows: int, strip: int) -> tuple[np.ndarray, np.ndarray]:
    """Tells which items have a whole tile, and counts the strips of the others."""
    whole = (items.begin == 0) & (items.end == rows)
    strips = -(-items.end // strip) - items.begin // strip
    return whole, np.where(whole | (items.begin == items.end), 0, strips)


def in_turns(blocks: int, num_cores: int) -> int:
    """Counts blocks as if each core had as many as the busiest."""
    return -(-blocks // num_cores) * num_cores
