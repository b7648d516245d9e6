"""Table of the attention implementations that can be compiled, and the task of compiling one."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from helios_jax import process
from helios_jax.bench.attention import jax_splash, ours, problem, tokamax
from helios_jax.bench.attention.problem import Candidate, Problem
from helios_jax.chips import Chip
from helios_jax.errors import UserError
from helios_jax.plan.compiler import alone, timing
from helios_jax.plan.compiler.operations import Operation
from helios_jax.plan.compiler.schedule import Schedule

MIB = 2**20
Row = dict[str, Any]


class Candidates(NamedTuple):
    """Candidates of one implementation: options worth a try, and a function that applies one.

    `Candidate.visits` says how often the regions of its kernels run: `Visits.bodies` names the
    branches and inner loops with vector work in the order of the code, `Visits.steps` counts the
    steps that are alike.
    """

    variants: Callable[[Problem, str, str], list[dict[str, Any]]]  # options for a pass on a target
    candidate: Callable[[Problem, dict[str, Any]], Candidate]


NOTHING = 'nothing'
OURS = 'helios'
IMPLEMENTATIONS = {
    OURS: Candidates(ours.variants, ours.candidate),
    'jax_splash': Candidates(jax_splash.variants, jax_splash.candidate),
    'tokamax': Candidates(tokamax.variants, tokamax.candidate),
    NOTHING: Candidates(
        lambda shape, which, target: [{}], lambda shape, options: problem.nothing()
    ),
}


class Task(NamedTuple):
    """One compilation of a candidate for a TPU."""

    target: str
    problem: dict[str, int]
    which: str  # forward | backward
    implementation: str
    options: dict[str, Any]
    alone: bool  # True: leave out the projections
    lengths: tuple[int, ...] = ()  # more lengths to predict from the same schedule


def compile_task(fields: dict[str, Any]) -> Row:
    """Compiles a task, given by its fields, and predicts its time; once in a process.

    Returns:
      The task's fields and what came of it, or why the compiler refused it.
    """
    task = Task(**fields)
    chip, shape = timing.CHIPS[task.target], Problem(**task.problem)
    implementation = IMPLEMENTATIONS[task.implementation]
    candidate = implementation.candidate(shape, task.options)
    function, arguments = problem.program(shape, candidate, task.which, alone=task.alone)
    row: Row = {**task._asdict()}
    try:
        compiled = alone.compile_here(
            function, arguments, chip, scoped_vmem_mib=task.options.get('scoped_vmem_mib', 0)
        )
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return row | {'refused': ' '.join(str(error).split())[:200]}
    kernels = [
        kernel_row(operation, compiled.schedules, candidate, chip)
        for operation in compiled.kernels
        if task.implementation != NOTHING
    ]
    at_lengths = {}
    for length in task.lengths:
        other = implementation.candidate(dataclasses.replace(shape, length=length), task.options)
        rows = [kernel_row(o, compiled.schedules, other, chip) for o in compiled.kernels]
        at_lengths[length] = sum(kernel['ms'] for kernel in rows)
    return row | {
        'at_lengths': at_lengths,
        'kernels': kernels,
        'kernel_ms': sum(kernel['ms'] for kernel in kernels),
        'others_ms': 1e3 * compiled.seconds,
        'hbm_mib': (compiled.hbm_bytes + sum(k['hbm_mib'] * MIB for k in kernels)) / MIB,
        'temp_mib': compiled.temp_bytes / MIB,
        'operations_ms': {
            o.name: round(1e3 * o.times * o.seconds, 4)
            for o in sorted(compiled.operations, key=lambda o: -o.seconds)
            if o.seconds > 1e-6
        },
    }


def kernel_row(
    operation: Operation,
    schedules: dict[str, Schedule],
    candidate: Candidate,
    chip: Chip,
) -> Row:
    """Predicts one kernel's time, and describes the kernel.

    Raises:
      UserError: the candidate's visits are not about this kernel, or it runs several times.
    """
    own = [visits for name, visits in candidate.visits.items() if name in operation.name]
    if len(own) != 1 or operation.name not in schedules:
        raise UserError(
            f'kernel {operation.name}: {len(own)} visits are known for it (there are: '
            f'{", ".join(candidate.visits)}), {len(schedules)} schedules were dumped.'
        )
    if operation.times > 1:
        raise UserError(
            f'kernel {operation.name} runs {operation.times} times, on chunks of keys that do not '
            'fit in VMEM together, and its visits are not known. Take a shorter --lengths.'
        )
    found = timing.predict(schedules[operation.name], own[0], chip)._asdict()
    return {
        'name': operation.name,
        'ms': 1e3 * found.pop('seconds'),
        'hbm_mib': found.pop('hbm_bytes') / MIB,
        'vmem_mib': operation.vmem_bytes / MIB,
        **found,
    }


def run(tasks: Iterable[Task], jobs: int) -> Iterator[Row]:
    """Yields the rows of the tasks in their order, `jobs` processes at a time."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda task: process.run(compile_task, task._asdict()), tasks)
