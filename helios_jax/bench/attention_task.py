"""What the attention bench can compile, and one compilation, in a process of its own."""

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from helios_jax.bench import (
    attention_ours,
    attention_peers,
    attention_problem,
    attention_tokamax,
    tpu_program,
    tpu_schedule,
    tpu_timing,
)
from helios_jax.bench.attention_problem import Problem, Setup
from helios_jax.chips import Chip
from helios_jax.errors import UserError

MIB = 2**20
Row = dict[str, Any]


class Implementation(NamedTuple):
    """To add one: the options worth a try, and how it is set up with one set of them.

    `Setup.plans` says how often the regions of its kernels run: `Plan.bodies` names the branches
    and inner loops with vector work in the order of the code, `Plan.steps` counts kinds of steps.
    """

    variants: Callable[[Problem, str, str], list[dict[str, Any]]]  # to try in a pass, on a target
    setup: Callable[[Problem, dict[str, Any]], Setup]


NOTHING = 'nothing'
OURS = 'helios'
IMPLEMENTATIONS = {
    OURS: Implementation(attention_ours.variants, attention_ours.setup),
    'jax_splash': Implementation(attention_peers.variants, attention_peers.setup),
    'tokamax': Implementation(attention_tokamax.variants, attention_tokamax.setup),
    NOTHING: Implementation(
        lambda problem, which, target: [{}],
        lambda problem, options: attention_problem.nothing(problem),
    ),
}


class Task(NamedTuple):
    """One compilation, in a process of its own."""

    target: str
    problem: dict[str, int]
    which: str  # forward | backward
    implementation: str
    options: dict[str, Any]
    alone: bool  # without the projections
    lengths: tuple[int, ...] = ()  # others to predict from the same schedule


def compile_here(task: Task) -> Row:
    """Compiles and reads; to be called once in a process.

    Returns:
      The task and what came of it, or the task and why the compiler refused it.
    """
    chip, problem = tpu_timing.CHIPS[task.target], Problem(**task.problem)
    implementation = IMPLEMENTATIONS[task.implementation]
    setup = implementation.setup(problem, task.options)
    function, arguments = attention_problem.program(problem, setup, task.which, alone=task.alone)
    row: Row = {**task._asdict()}
    try:
        program = tpu_program.compile_here(
            function, arguments, chip, scoped_vmem_mib=task.options.get('scoped_vmem_mib', 0)
        )
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return row | {'refused': ' '.join(str(error).split())[:200]}
    kernels = [
        kernel_row(operation, program.schedules, setup, chip)
        for operation in program.kernels
        if task.implementation != NOTHING
    ]
    at_lengths = {}
    for length in task.lengths:
        other = implementation.setup(dataclasses.replace(problem, length=length), task.options)
        rows = [kernel_row(o, program.schedules, other, chip) for o in program.kernels]
        at_lengths[length] = sum(kernel['ms'] for kernel in rows)
    return row | {
        'at_lengths': at_lengths,
        'kernels': kernels,
        'kernel_ms': sum(kernel['ms'] for kernel in kernels),
        'others_ms': 1e3 * program.seconds,
        'hbm_mib': (program.hbm_bytes + sum(k['hbm_mib'] * MIB for k in kernels)) / MIB,
        'temp_mib': program.temp_bytes / MIB,
        'operations_ms': {
            o.name: round(1e3 * o.times * o.seconds, 4)
            for o in sorted(program.operations, key=lambda o: -o.seconds)
            if o.seconds > 1e-6
        },
    }


def kernel_row(
    operation: tpu_program.Operation,
    schedules: dict[str, tpu_schedule.Schedule],
    setup: Setup,
    chip: Chip,
) -> Row:
    plans = [plan for name, plan in setup.plans.items() if name in operation.name]
    if len(plans) != 1 or operation.name not in schedules:
        raise UserError(
            f'kernel {operation.name}: {len(plans)} plans are for it (there are: '
            f'{", ".join(setup.plans)}), {len(schedules)} schedules were dumped.'
        )
    if operation.times > 1:
        raise UserError(
            f'kernel {operation.name} runs {operation.times} times, on parts of keys that do not '
            'fit in VMEM together: no plan is for that. Take a shorter --lengths.'
        )
    found = tpu_timing.predict(schedules[operation.name], plans[0], chip)._asdict()
    return {
        'name': operation.name,
        'ms': 1e3 * found.pop('seconds'),
        'hbm_mib': found.pop('hbm_bytes') / MIB,
        'vmem_mib': operation.vmem_bytes / MIB,
        **found,
    }


def run(tasks: Iterable[Task], jobs: int) -> Iterator[Row]:
    """The rows of the tasks, in their order, `jobs` processes at a time."""

    def one(task: Task) -> Row:
        here = ['bench', 'attention', f'--here={json.dumps(task._asdict())}']
        command = [sys.executable, '-m', 'helios_jax', *here]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            print(done.stderr, file=sys.stderr, flush=True)
            raise UserError(f'compiling {task} ended with code {done.returncode}; see above.')
        return json.loads(lines[-1])

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, tasks)
