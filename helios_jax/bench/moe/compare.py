"""Predicts a mixture of experts on a TPU: our products beside jax's megablox, our permutations.

    helios bench moe --target=v5p --shapes=e8,e128 [--json]

Needs libtpu (the extra `tpu`), no TPU. Each implementation of each product is compiled with each of
its options, in a process of its own; its time is its kernel's schedule, how often each region of it
runs for the problem's groups, and the bytes that it copies (plan/compiler/timing.py). Beside it
stand two floors: a dense matmul of the same FLOPs at the chip's peak, and one reading of operands
and one writing of the result at its bandwidth. Loads are even, or skewed: the busiest expert has
four times the rows of the idlest, and groups begin at any row.

A step that copies more than it computes waits. What our kernels copy once a group, the next group's
weights or the last one's gradient, may take all steps of a group, and is counted so. Left out is
what bench/attention/compare.py leaves out; the work list around a kernel is `around`. Last come the
permutations of rows beside XLA's gather (permutation.py).
"""

import dataclasses
import sys
from collections import defaultdict

import jax

from helios_jax import options
from helios_jax.bench.moe import permutation
from helios_jax.bench.moe.problem import LOADS, PRODUCTS, SHAPES, GroupedProblem
from helios_jax.bench.moe.task import IMPLEMENTATIONS, OURS, GroupedTask, Row, run
from helios_jax.errors import require
from helios_jax.plan.compiler.timing import CHIPS


def compare_products(
    target: str, shapes: list[str], *, names: list[str], jobs: int, as_json: bool
) -> None:
    """Predicts and prints the fastest options of each implementation, shape, product and load.

    Args:
      names: implementations to compile, all if none is named.
    Raises:
      UserError: no such target, shape or implementation.
    """
    require(target in CHIPS, f'--target={target}: there are {", ".join(CHIPS)}.')
    for name in shapes:
        require(name in SHAPES, f'--shapes={name}: there are {", ".join(SHAPES)}.')
    for name in names:
        known = ', '.join(IMPLEMENTATIONS)
        require(name in IMPLEMENTATIONS, f'--implementations={name}: there are {known}.')
    for shape in shapes:
        problems = [GroupedProblem(*SHAPES[shape], load=load) for load in LOADS]
        if not as_json:
            print(f'{target} {describe_problem(problems[0])}')
        for product in PRODUCTS:
            tasks = [
                GroupedTask(target, list(map(dataclasses.asdict, problems)), product, name, tried)
                for name in names or IMPLEMENTATIONS
                for tried in IMPLEMENTATIONS[name].variants(problems[0], product, target)
            ]
            for row in fastest(row for rows in run(tasks, jobs) for row in rows):
                print(options.to_json(row) if as_json else describe(row), flush=True)
        if OURS in (names or IMPLEMENTATIONS):
            for row in permutation.compare_rows(target, problems[0]):
                print(options.to_json(row) if as_json else permutation.describe(row), flush=True)


def fastest(rows) -> list[Row]:
    """Keeps the fastest row of each load and implementation, and sets it beside floors and ours."""
    kept: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if 'refused' in row:
            print(f'{row["implementation"]} {row["options"]}: {row["refused"]}', file=sys.stderr)
        else:
            kept[row['problem']['load'], row['implementation']].append(row)
    found = {key: min(some, key=lambda row: row['seconds']) for key, some in kept.items()}
    for (load, _), row in found.items():
        floor = GroupedProblem(**row['problem']).floor_seconds(CHIPS[row['target']])
        row |= {'jax': jax.__version__, 'floor_seconds': floor}
        row['share_of_dense'] = floor['flops'] / row['seconds']
        if ours := found.get((load, OURS)):
            row['times_ours'] = row['seconds'] / ours['seconds']
    return sorted(found.values(), key=lambda row: LOADS.index(row['problem']['load']))


def describe_problem(problem: GroupedProblem) -> str:
    M, E, D, F = dataclasses.astuple(problem)[:4]
    return f'E {E}, D {D}, F {F}, M {M}: {M // E} rows an expert, bfloat16'


def describe(row: Row) -> str:
    """Writes a row as two lines of text."""
    floor = row['floor_seconds']
    ratio = f' {row["times_ours"]:.2f} × {OURS}' if row['implementation'] != OURS else ''
    tiles = ' '.join(f'{name}={value}' for name, value in row['options'].items())
    bodies = ', '.join(f'{name} {cycles}' for name, cycles in row['bodies'].items())
    return (
        f'  {row["product"]:7} {row["problem"]["load"]:6} {row["implementation"]:8} '
        f'{1e3 * row["seconds"]:8.3f} ms {row["cycles"]:>12,.0f} cycles '
        f'{row["share_of_dense"]:6.1%} of a dense product ({1e3 * floor["flops"]:.3f} ms; bytes '
        f'{1e3 * floor["bytes"]:.3f} ms){ratio}\n'
        f'    {row["grid_steps"]:,.0f} steps of {row["every_step"]} cycles + {bodies}; '
        f'{row["num_cores"]} core(s), waiting {row["waiting"] / row["cycles"]:.0%}, HBM '
        f'{row["hbm_bytes"] / 1e9:.2f} GB, VMEM {row["vmem_mib"]:.1f} MiB, around '
        f'{1e6 * row["around_seconds"]:.0f} µs  ({tiles})'
    )
