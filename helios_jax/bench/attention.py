"""What the compiler makes of attention on a TPU: ours beside jax's and tokamax's splash attention.

    helios bench attention --target=v5p --lengths=2048,4096,16384 [--documents=16] [--json]

Needs libtpu (the extra `aot`), and for tokamax the extra `bench`; no TPU. Each implementation and
pass is compiled with each of its options (block sizes and the like), each in a process of its own;
the fastest then inside the whole attention layer (attention_problem.py). A pass takes
  kernel: from its schedule, how often each region runs and the bytes that it copies
    (tpu_schedule.py); plus
  around: the layer's other operations, less those of the same layer around a kernel that does
    nothing: rotation, copies and transposes, residuals, delta, sums over partial gradients.
The ratio is a peer's sum by ours. FLOPs are those that the mask leaves, so that wasted work shows.

Left out: what a call costs before its first step (some microseconds), the copies before the first
step and after the last, the latency of copies (only their bytes count), contention for HBM between
a kernel and XLA's prefetches, arrays that XLA puts in VMEM (a kernel's bytes count as HBM's),
throttling of the clock, and everything that overlaps with the layer's neighbours. Against the
figures that tokamax's authors measured, printed beside the prediction: at T = 16k it is right
within 4%; short calls take longer than predicted, for all implementations alike.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from helios_jax.bench import attention_peers, attention_problem, tpu_program, tpu_schedule
from helios_jax.bench.attention_problem import PASSES, Problem, Setup
from helios_jax.errors import UserError, require

MIB = 2**20
Row = dict[str, Any]


class Implementation(NamedTuple):
    """To add one: what to try for a problem and pass, and how to set it up with one of these."""

    options: Callable[[Problem, str], list[dict[str, Any]]]
    setup: Callable[[Problem, dict[str, Any]], Setup]


NOTHING = 'nothing'
OURS = 'helios'
IMPLEMENTATIONS = {
    'jax_splash': Implementation(attention_peers.jax_splash_options, attention_peers.jax_splash),
    'tokamax': Implementation(attention_peers.tokamax_options, attention_peers.tokamax),
    NOTHING: Implementation(
        lambda problem, which: [{}], lambda problem, options: attention_problem.nothing(problem)
    ),
}
# TFLOP/s of tokamax's forward pass with residuals, causal, bfloat16, H = 128, by its authors.
MEASURED = {
    'v5p': {2048: 136, 4096: 186, 8192: 255, 16384: 315},
    'v6e': {2048: 89, 4096: 137, 8192: 194, 16384: 255},
}


class Task(NamedTuple):
    """One compilation, in a process of its own."""

    target: str
    problem: dict[str, int]
    which: str  # forward | backward
    implementation: str
    options: dict[str, Any]
    alone: bool  # without the projections


def compile_here(task: Task) -> Row:
    """Compiles and reads; to be called once in a process.

    Returns:
      The task and what came of it, or the task and why the compiler refused it.
    """
    chip, problem = tpu_schedule.CHIPS[task.target], Problem(**task.problem)
    setup = IMPLEMENTATIONS[task.implementation].setup(problem, task.options)
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
    return row | {
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
    chip: tpu_schedule.Chip,
) -> Row:
    plans = [plan for name, plan in setup.plans.items() if operation.name.startswith(name)]
    if len(plans) != 1 or operation.name not in schedules:
        raise UserError(
            f'kernel {operation.name}: {len(plans)} plans begin with its name (there are: '
            f'{", ".join(setup.plans)}), {len(schedules)} schedules were dumped.'
        )
    found = tpu_schedule.predict(schedules[operation.name], plans[0], chip)._asdict()
    return {
        'name': operation.name,
        'calls': operation.times,
        'ms': 1e3 * operation.times * found.pop('seconds'),
        'hbm_mib': operation.times * found.pop('hbm_bytes') / MIB,
        'vmem_mib': operation.vmem_bytes / MIB,
        **found,
    }


def run(tasks: Iterable[Task], jobs: int) -> list[Row]:
    """The rows of the tasks, in their order, `jobs` processes at a time."""

    def one(task: Task) -> Row:
        here = ['bench', 'attention', f'--here={json.dumps(task._asdict())}']
        done = subprocess.run(
            [sys.executable, '-m', 'helios_jax', *here],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = '; '.join(done.stderr.strip().splitlines()[-20:])
            raise UserError(f'compiling {task} ended with code {done.returncode}: {last}')
        return json.loads(lines[-1])

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, tasks))


def measure(target: str, problem: Problem, names: list[str], jobs: int) -> list[Row]:
    """One row for each implementation and pass, with the fastest of its options."""
    rows = []
    for which in PASSES:
        base = Task(target, dataclasses.asdict(problem), which, NOTHING, {}, False)
        tasks = [
            base._replace(implementation=name, options=options, alone=True)
            for name in names
            for options in IMPLEMENTATIONS[name].options(problem, which)
        ]
        tried = run(tasks, jobs)
        for row in tried:
            print(describe_trial(row), file=sys.stderr, flush=True)
        finals = [base]
        for name in names:
            mine = [row for row in tried if row['implementation'] == name and 'ms' in score(row)]
            if mine:
                best = min(mine, key=lambda row: score(row)['ms'])
                finals.append(base._replace(implementation=name, options=best['options']))
        nothing, *found = run(finals, jobs)
        rows += [finished(row, nothing, problem) for row in found]
    return rows


def score(row: Row) -> Row:
    """Milliseconds of a trial, unless the compiler refused it."""
    return {} if 'refused' in row else {'ms': row['kernel_ms'] + row['others_ms']}


def describe_trial(row: Row) -> str:
    options = ' '.join(f'{name}={value}' for name, value in row['options'].items())
    head = f'{row["target"]} {row["which"]} {row["implementation"]} {options}'
    if 'refused' in row:
        return f'{head}: refused, {row["refused"]}'
    return f'{head}: kernel {row["kernel_ms"]:.3f} ms, others {row["others_ms"]:.3f} ms'


def finished(row: Row, nothing: Row, problem: Problem) -> Row:
    """A layer's row with what attention adds to the one that does nothing."""
    chip = tpu_schedule.CHIPS[row['target']]
    around_ms = row['others_ms'] - nothing['others_ms']
    total_ms = row['kernel_ms'] + around_ms
    row |= {
        'around_ms': around_ms,
        'around_cycles': around_ms / 1e3 * chip.clock,
        'total_ms': total_ms,
        'total_hbm_mib': row['hbm_mib'] - nothing['hbm_mib'],
        'kernel_tflops': problem.flops(row['which']) / row['kernel_ms'] / 1e9,
        'tflops': problem.flops(row['which']) / total_ms / 1e9,
    }
    known = MEASURED.get(row['target'], {}).get(problem.length)
    plain = problem.documents == 1 and not problem.window and problem.head_dim == 128
    if known and plain and (row['which'], row['implementation']) == ('forward', 'tokamax'):
        row['measured_tflops'] = known
    return row


def ratios(rows: list[Row]) -> dict[str, float]:
    """The fastest peer's time by ours, for each pass of rows of one problem that has both."""
    found = {}
    for which in PASSES:
        ours = [r['total_ms'] for r in rows if (r['which'], r['implementation']) == (which, OURS)]
        peers = [r['total_ms'] for r in rows if r['which'] == which and r['implementation'] != OURS]
        if ours and peers:
            found[which] = min(peers) / ours[0]
    return found


def describe(row: Row) -> str:
    options = ' '.join(f'{name}={value}' for name, value in row['options'].items())
    lines = [
        f'{row["which"]:8} {row["implementation"]:10} {row["kernel_ms"]:9.3f} ms kernel '
        f'+ {row["around_ms"]:7.3f} around = {row["total_ms"]:9.3f} ms  '
        f'{row["tflops"]:6.1f} TFLOP/s  HBM {row["total_hbm_mib"]:,.0f} MiB  ({options})'
    ]
    if 'measured_tflops' in row:
        lines.append(
            f'    its authors measured {row["measured_tflops"]} TFLOP/s; the kernel is predicted '
            f'at {row["kernel_tflops"]:.0f}'
        )
    for kernel in row['kernels']:
        bodies = ', '.join(f'{name} {cycles}' for name, cycles in kernel['bodies'].items())
        lines.append(
            f'    {kernel["name"]}: {kernel["grid_steps"]:,.0f} steps of {kernel["every_step"]} '
            f'cycles + {bodies}; {kernel["num_cores"]} core(s), {kernel["cycles"]:,.0f} cycles, '
            f'MXU {kernel["mxu_share"]:.0%}, waiting {kernel["waiting"] / kernel["cycles"]:.0%}, '
            f'HBM {kernel["hbm_mib"]:,.0f} MiB, VMEM {kernel["vmem_mib"]:.1f} MiB, '
            f'{kernel["spills"]:,} spills'
        )
    return '\n'.join(lines)


def compare(
    target: str,
    problems: list[Problem],
    *,
    names: list[str],
    earlier: str,
    jobs: int,
    as_json: bool,
) -> None:
    """Measures and prints each problem.

    Args:
      names: implementations to compile, all if none is named; tokamax is left out with a warning
        where it is not installed.
      earlier: file of an earlier run's JSON: its rows of the same problems, by implementations that
        are not compiled now, are printed and compared too.
    Raises:
      UserError: no such target, implementation or file.
    """
    require(
        target in tpu_schedule.CHIPS,
        f'--target={target}: there are {", ".join(tpu_schedule.CHIPS)}.',
    )
    known = [name for name in IMPLEMENTATIONS if name != NOTHING]
    for name in names:
        require(name in known, f'--implementations={name}: there are {", ".join(known)}.')
    names = names or known
    require(not earlier or Path(earlier).is_file(), f'--earlier={earlier}: no such file.')
    lines = Path(earlier).read_text().splitlines() if earlier else []
    before = [row for row in map(json.loads, lines) if row['implementation'] not in names]
    if 'tokamax' in names and not importlib.util.find_spec('tokamax'):
        print("tokamax is not installed: pip install 'helios_jax[bench]'", file=sys.stderr)
        names = [name for name in names if name != 'tokamax']
    for problem in problems:
        shape = dataclasses.asdict(problem)
        rows = [row for row in before if (row['target'], row['problem']) == (target, shape)]
        rows += measure(target, problem, names, jobs)
        rows.sort(key=lambda row: PASSES.index(row['which']))
        if as_json:
            for row in rows:
                print(json.dumps(row), flush=True)
            continue
        print(f'{target} ' + ' '.join(f'{name}={value}' for name, value in shape.items()))
        print('\n'.join(f'  {line}' for row in rows for line in describe(row).splitlines()))
        for which, ratio in ratios(rows).items():
            print(f'  {which}: best peer ÷ {OURS} = {ratio:.2f}')
        sys.stdout.flush()
