"""Predicts our grouped matmuls: how often their regions run, and the time that takes."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.chips import CHIPS
from helios_jax.kernels.grouped_matmul import tpu
from helios_jax.kernels.grouped_matmul.tpu import gradient_kernel, multiply_kernel, tiles, work
from helios_jax.kernels.grouped_matmul.tpu.tiles import GradientTiles, MultiplyTiles
from helios_jax.kernels.grouped_matmul.tpu.work import GroupWork
from helios_jax.plan.compiler import alone, timing
from helios_jax.plan.compiler.program import SHAPE, Instruction
from helios_jax.plan.compiler.timing import HALF, Visits, changes, tally

MULTIPLY, GRADIENT = multiply_kernel.NAME, gradient_kernel.NAME
TRANSPOSED = f'{MULTIPLY}_transposed'


def multiply_visits(
    group_sizes: np.ndarray, depth: int, width: int, chosen: MultiplyTiles, num_cores: int
) -> Visits:
    """Counts the visits of a product by weights, for the core with the most blocks of columns.

    Args:
      group_sizes: [E], whose sum is the number of rows.
      depth, width: columns of the rows, and of the result.
    """
    sizes, num_rows = jnp.asarray(group_sizes), int(group_sizes.sum())
    group, tile, begin, end = arrays(work.of_tiles(sizes, num_rows, chosen.rows))
    whole = (begin == 0) & (end == chosen.rows)
    runs = {'blank': changes(tile) * ~whole}
    runs |= products(chosen.sizes, chosen.steps, chosen.columns, begin, end)
    moved = changes(tile) * chosen.rows * (depth + chosen.columns)
    moved = moved + shared(group, end - begin) * depth * chosen.columns
    return tally(runs, HALF * moved, in_turns(width // chosen.columns, num_cores))


def gradient_visits(
    group_sizes: np.ndarray, height: int, width: int, chosen: GradientTiles, num_cores: int
) -> Visits:
    """Counts the visits of the gradient of weights [E height width], as `multiply_visits`."""
    sizes, num_rows = jnp.asarray(group_sizes), int(group_sizes.sum())
    group, tile, begin, end = arrays(work.of_groups(sizes, num_rows, chosen.rows))
    runs = {'empty': begin == end}
    runs |= products(chosen.sizes, chosen.steps, chosen.height, begin, end)
    moved = changes(tile) * chosen.rows * (chosen.height + chosen.width)
    moved = moved + shared(group, np.maximum(end - begin, 1)) * chosen.height * chosen.width
    blocks = -(-height // chosen.height) * -(-width // chosen.width)
    return tally(runs, HALF * moved, in_turns(blocks, num_cores))


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


class Product(NamedTuple):
    """A grouped matmul of ours in a program: which one, and its sizes."""

    name: str  # MULTIPLY | TRANSPOSED | GRADIENT
    num_rows: int
    num_groups: int
    height: int  # of the matrices of a group
    width: int


def product(kernel: Instruction) -> Product | None:
    """Reads which grouped matmul a kernel is; None if it is none, or none in bfloat16."""
    name = re.sub(r'[.\d]+$', '', kernel.name)
    if name not in (MULTIPLY, TRANSPOSED, GRADIENT):
        return None
    shapes = re.search(r'operand_layout_constraints=\{(.*?)\}, \w+=', kernel.text)
    found = SHAPE.findall(f'{shapes[1] if shapes else ""} {kernel.shape}')
    arrays = [tuple(map(int, dims.split(','))) for kind, dims, *_ in found if kind == 'bf16']
    matrices = [dims for dims in arrays if len(dims) == 3]
    rows = [dims for dims in arrays if len(dims) == 2]
    return Product(name, rows[0][0], *matrices[0]) if rows and matrices else None


def seconds_alone(target: str, sizes: dict[str, Any]) -> float | None:
    """Predicts a product by its schedule; once in a process (`alone.compile_here`).

    Every group has its even share of the rows.

    Args:
      target: name of a chip.
      sizes: fields of `Product`.
    Returns:
      Seconds; None if it was compiled to other regions than are counted.
    """
    at, chip = Product(**sizes), CHIPS[target]
    M, E, D, F = at.num_rows, at.num_groups, at.height, at.width
    ends = np.rint(np.arange(1, E + 1) * M / E).astype(np.int32)
    loads = np.diff(ends, prepend=np.int32(0))
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    group_sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    transposed = at.name == TRANSPOSED
    if at.name == GRADIENT:
        chosen = tiles.for_gradient(target, M, D, F, E, HALF)
        visits = gradient_visits(loads, D, F, chosen, chip.num_cores)
        operands = shape(M, D), shape(M, F)
        function: Any = tpu.weight_gradient
    else:
        depth, width = (F, D) if transposed else (D, F)
        of_rows = tiles.for_multiply(target, M, depth, width, E, HALF, transposed)
        visits = multiply_visits(loads, depth, width, of_rows, chip.num_cores)
        operands = shape(M, depth), shape(E, D, F)
        function = lambda x, w, sizes: tpu.multiply(x, w, sizes, transposed=transposed)
    compiled = alone.compile_here(function, (*operands, group_sizes), chip)
    (own,) = (o for o in compiled.kernels if at.name in o.name)
    with contextlib.suppress(ValueError):
        return timing.predict(compiled.schedules[own.name], visits, chip).seconds
    return None
