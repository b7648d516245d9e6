"""Makes our kernels candidates."""

from typing import Any

from helios_jax.bench.moe.problem import ROWS, WEIGHTS, GroupedCandidate, GroupedProblem
from helios_jax.chips import CHIPS
from helios_jax.kernels.grouped_matmul import tpu
from helios_jax.kernels.grouped_matmul.tpu import tiles
from helios_jax.kernels.grouped_matmul.tpu.tiles import GradientTiles, MultiplyTiles
from helios_jax.plan.compiler import grouped_matmul
from helios_jax.plan.compiler.timing import HALF

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
    """Makes a product by weights."""

    def function(x: Any, weights: Any, sizes: Any) -> Any:
        return tpu.multiply(x, weights, sizes, transposed=product == ROWS, chosen=chosen)

    D, F = problem.embed_dim, problem.expert_dim
    depth, width = (F, D) if product == ROWS else (D, F)
    counted = problem.group_sizes, depth, width, chosen, num_cores
    visits = grouped_matmul.multiply_visits(*counted)
    return GroupedCandidate(function, grouped_matmul.MULTIPLY, visits)


def gradient_candidate(
    problem: GroupedProblem, chosen: GradientTiles, num_cores: int
) -> GroupedCandidate:
    """Makes the gradient of the weights."""

    def function(x: Any, gradient: Any, sizes: Any) -> Any:
        return tpu.weight_gradient(x, gradient, sizes, chosen=chosen)

    sizes = problem.embed_dim, problem.expert_dim
    visits = grouped_matmul.gradient_visits(problem.group_sizes, *sizes, chosen, num_cores)
    return GroupedCandidate(function, grouped_matmul.GRADIENT, visits)
