"""Table of the grouped matmuls that can be compiled, and the task of compiling one."""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from helios_jax import process
from helios_jax.bench.moe import megablox, ours
from helios_jax.bench.moe.problem import GroupedCandidate, GroupedProblem
from helios_jax.errors import UserError
from helios_jax.plan.compiler import alone, timing

Row = dict[str, Any]


class GroupedCandidates(NamedTuple):
    """Candidates of one implementation: options worth a try, and what applies one."""

    variants: Callable[[GroupedProblem, str, str], list[dict[str, Any]]]  # of a product on a target
    candidate: Callable[[GroupedProblem, str, dict[str, Any], str], GroupedCandidate]


OURS = 'helios'
IMPLEMENTATIONS = {
    OURS: GroupedCandidates(ours.variants, ours.candidate),
    'megablox': GroupedCandidates(megablox.variants, megablox.candidate),
}


class GroupedTask(NamedTuple):
    """One compilation of a product for a TPU, timed for problems that differ in their loads."""

    target: str
    problems: list[dict[str, Any]]
    product: str
    implementation: str
    options: dict[str, Any]


def compile_task(fields: dict[str, Any]) -> list[Row]:
    """Compiles a task, given by its fields; once in a process.

    Returns:
      A row for each problem: the task, and what came of it or why the compiler refused it.
    """
    task = GroupedTask(**fields)
    chip, problems = timing.CHIPS[task.target], [GroupedProblem(**p) for p in task.problems]
    make = IMPLEMENTATIONS[task.implementation].candidate
    candidates = [make(p, task.product, task.options, task.target) for p in problems]
    rows: list[Row] = [
        {
            'target': task.target, 'problem': problem, 'product': task.product,
            'implementation': task.implementation, 'options': task.options,
        }
        for problem in task.problems
    ]  # fmt: skip
    try:
        compiled = alone.compile_here(
            candidates[0].function,
            problems[0].arguments(task.product),
            chip,
            scoped_vmem_mib=task.options.get('scoped_vmem_mib', 0),
        )
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return [row | {'refused': ' '.join(str(error).split())[:200]} for row in rows]
    own = [o for o in compiled.kernels if candidates[0].kernel in o.name]
    if len(own) != 1:
        names = ', '.join(o.name for o in compiled.kernels)
        raise UserError(f'{task.implementation} was compiled to the kernels {names or "none"}.')
    schedule = compiled.schedules[own[0].name]
    return [
        row
        | timing.predict(schedule, candidate.visits, chip)._asdict()
        | {
            'around_seconds': compiled.seconds,
            'vmem_mib': own[0].vmem_bytes / 2**20,
            'temp_mib': compiled.temp_bytes / 2**20,
        }
        for row, candidate in zip(rows, candidates, strict=True)
    ]


def run(tasks: Iterable[GroupedTask], jobs: int) -> Iterator[list[Row]]:
    """Yields the rows of the tasks in their order, `jobs` processes at a time."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda task: process.run(compile_task, task._asdict()), tasks)
