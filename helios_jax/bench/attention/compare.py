"""Predicts attention's time on a TPU: our kernels beside jax's and tokamax's splash attention.

    helios bench attention --target=v5p --lengths=2048,4096,16384 [--documents=16] [--json]

Needs libtpu (the extra `tpu`), and for tokamax the extra `bench`; no TPU. Each implementation and
pass is compiled with each of its options (block sizes and the like), each in a process of its own;
the fastest then inside the whole attention layer (problem.py). The time of a pass is the sum of
  kernel: by its schedule (tpu/schedule.py), how often each region runs and the bytes it copies;
  around: the layer's other operations, less those of the same layer around a kernel that does
    nothing: rotation, copies and transposes, residuals, delta, sums over partial gradients.
The ratio is a peer's sum divided by ours. FLOPs count what the mask leaves: wasted work shows.

Left out: what a call costs before its first step (some microseconds), the copies before the first
step and after the last, the latency of copies (only their bytes count), contention for HBM between
a kernel and XLA's prefetches, arrays that XLA puts in VMEM (a kernel's bytes count as HBM's), an
uneven split over two cores, throttling of the clock, and whatever overlaps with the layer's
neighbours.

Checked against tokamax's forward kernel as its authors measured it, TFLOP/s at T = 2k, 4k, 8k, 16k
(they give neither heads nor blocks; predicted for N = 32 and blocks of 2048):
  v5p  measured 136 186 255 315, predicted 146 209 266 307
  v6e  measured  89 137 194 255, predicted 125 179 228 263
Long calls are right within 4%; short ones take longer than predicted, by up to 12% on v5p and 40%
on v6e. All implementations share that, which brings their true ratio closer to one.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from helios_jax import options
from helios_jax.bench.attention import tokamax
from helios_jax.bench.attention.problem import PASSES, Problem
from helios_jax.bench.attention.task import IMPLEMENTATIONS, NOTHING, OURS, Row, Task, run
from helios_jax.errors import require
from helios_jax.plan.compiler.timing import CHIPS

# TFLOP/s of tokamax's forward pass with residuals, causal, bfloat16, H = 128, by its authors.
MEASURED = {
    'v5p': {2048: 136, 4096: 186, 8192: 255, 16384: 315},
    'v6e': {2048: 89, 4096: 137, 8192: 194, 16384: 255},
}


def fastest(
    target: str, problem: Problem, names: list[str], before: list[Row], jobs: int
) -> list[Row]:
    """Finds the fastest options of each implementation and pass: a row each, of the whole layer.

    Args:
      before: rows of other implementations on the same problem, which are not made again.
    """
    rows = []
    for which in PASSES:
        base = Task(target, dataclasses.asdict(problem), which, NOTHING, {}, False)
        tasks = [
            base._replace(implementation=name, options=options, alone=True)
            for name in names
            for options in IMPLEMENTATIONS[name].variants(problem, which, target)
        ]
        tried = []
        for row in run(tasks, jobs):
            print(describe_trial(row), file=sys.stderr, flush=True)
            tried.append(row)
        finals = []
        for name in names:
            mine = [r for r in tried if r['implementation'] == name and 'refused' not in r]
            if mine:
                best = min(mine, key=lambda r: r['kernel_ms'] + r['others_ms'])
                finals.append(base._replace(implementation=name, options=best['options']))
        nothing = next(
            (r['nothing'] for r in before if (r['which'], r['jax']) == (which, jax.__version__)),
            None,
        )
        if not nothing:
            (nothing,) = run([base], jobs)
        rows += [finished(row, nothing, problem) for row in run(finals, jobs)]
    return rows


def describe_trial(row: Row) -> str:
    """Writes a line about one set of options."""
    options = ' '.join(f'{name}={value}' for name, value in row['options'].items())
    head = f'{row["target"]} {row["which"]} {row["implementation"]} {options}'
    if 'refused' in row:
        return f'{head}: refused, {row["refused"]}'
    return f'{head}: kernel {row["kernel_ms"]:.3f} ms, others {row["others_ms"]:.3f} ms'


def finished(row: Row, nothing: Row, problem: Problem) -> Row:
    """Adds to a layer's row the time that attention takes beyond a layer that does nothing."""
    chip = CHIPS[row['target']]
    around_ms = row['others_ms'] - nothing['others_ms']
    total_ms = row['kernel_ms'] + around_ms
    row |= {
        'jax': jax.__version__,
        'nothing': {name: nothing[name] for name in ('others_ms', 'hbm_mib')},
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
    """Divides the fastest peer's time by ours, in each pass that both have rows of."""
    found = {}
    for which in PASSES:
        ours = [r['total_ms'] for r in rows if (r['which'], r['implementation']) == (which, OURS)]
        peers = [r['total_ms'] for r in rows if r['which'] == which and r['implementation'] != OURS]
        if ours and peers:
            found[which] = min(peers) / ours[0]
    return found


def describe(row: Row) -> str:
    """Writes a row as text: a line for the layer, a line for each kernel."""
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


def compare_implementations(
    target: str,
    problems: list[Problem],
    *,
    names: list[str],
    earlier: str,
    jobs: int,
    as_json: bool,
) -> None:
    """Predicts and prints each problem's rows.

    Args:
      names: implementations to compile, all if none is named; tokamax is left out with a warning
        where it is not installed.
      earlier: file of an earlier run's JSON: its rows of the same problems, by implementations that
        are not compiled now, are printed and compared too.
    Raises:
      UserError: no such implementation or file.
    """
    known = [name for name in IMPLEMENTATIONS if name != NOTHING]
    for name in names:
        require(name in known, f'--implementations={name}: there are {", ".join(known)}.')
    names = names or known
    require(not earlier or Path(earlier).is_file(), f'--earlier={earlier}: no such file.')
    lines = Path(earlier).read_text().splitlines() if earlier else []
    before = [row for row in map(json.loads, lines) if row['implementation'] not in names]
    if 'tokamax' in names and (missing := tokamax.missing()):
        print(missing, file=sys.stderr)
        names = [name for name in names if name != 'tokamax']
    for problem in problems:
        shape = dataclasses.asdict(problem)
        rows = [row for row in before if (row['target'], row['problem']) == (target, shape)]
        rows += fastest(target, problem, names, rows, jobs)
        rows.sort(key=lambda row: PASSES.index(row['which']))
        if as_json:
            for row in rows:
                print(options.to_json(row), flush=True)
            continue
        print(f'{target} ' + ' '.join(f'{name}={value}' for name, value in shape.items()))
        print('\n'.join(f'  {line}' for row in rows for line in describe(row).splitlines()))
        for which, ratio in ratios(rows).items():
            print(f'  {which}: best peer ÷ {OURS} = {ratio:.2f}')
        sys.stdout.flush()
