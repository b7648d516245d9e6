"""Searches the block sizes of our TPU kernels by the compiler's schedules.

    helios bench attention --tune --target=v5e --head_dim=128

Each shape is compiled once, at 4,096 tokens. Its time at other lengths follows from the same
schedule, because only how often its regions run depends on the length.
"""

import dataclasses
import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp

from helios_jax.bench.attention.problem import PASSES, Problem
from helios_jax.bench.attention.task import OURS, Task, run
from helios_jax.chips import CHIPS
from helios_jax.kernels.attention.tpu import backward_kernel, blocks
from helios_jax.kernels.attention.tpu.blocks import Shape

LENGTHS = (2048, 4096, 8192, 16384, 131072)
COMPILED = 4096
# Rows, keys of a block, of a strip, of a run, and the width of a product. Grid steps cost some
# hundred cycles each, so that blocks of keys are long. Runs of 2,048 keys would save 1% of the
# forward pass at 16,384 tokens, and double the time that a kernel takes to compile.
CANDIDATES = {
    'forward': list(itertools.product((1024, 2048), (4096,), (256, 512), (1024,), (512,))),
    'backward': list(itertools.product((1024, 2048), (4096,), (256, 512), (1024,), (256, 2048))),
}


def tune(target: str, head_dim: int, jobs: int) -> None:
    """Writes the fastest shapes of both passes into the package's table."""
    problem = Problem(length=COMPILED, head_dim=head_dim)
    found: dict[str, dict[int, Shape]] = {}
    for which in PASSES:
        shapes = [
            Shape(rows, keys, strip, run // strip, width)
            for rows, keys, strip, run, width in CANDIDATES[which]
        ]
        base = Task(target, dataclasses.asdict(problem), which, OURS, {}, True, LENGTHS)
        tasks = [base._replace(options={'shape': shape}) for shape in shapes]
        times = []
        for shape, row in zip(shapes, run(tasks, jobs), strict=True):
            took = row.get('at_lengths', {})
            print(target, which, *shape, took or row['refused'], file=sys.stderr, flush=True)
            times.append({int(length): ms for length, ms in took.items()})
        found[which] = {}
        for length in LENGTHS:
            able = [
                (chunks(target, problem, which, length, shape), time[length], shape)
                for time, shape in zip(times, shapes, strict=True)
                if time
            ]
            found[which][length] = min(able)[-1]
    write(target, head_dim, found)


def chunks(target: str, problem: Problem, which: str, length: int, shape: Shape) -> int:
    """Counts the chunks that the keys come in, which the prediction does not account for."""
    if which == 'forward':
        return 1
    group = problem.heads // problem.kv_heads
    out = jax.ShapeDtypeStruct((1, 1, group, length, problem.head_dim), jnp.bfloat16)
    sizes = blocks.fit(shape, group, length, length)
    most = functools.partial(
        backward_kernel.keys_in_memory, out, sizes, CHIPS[target].kernel_vmem_bytes
    )
    return 1 if length <= most() else -(-length // most(in_chunks=True))


def write(target: str, head_dim: int, found: dict[str, dict[int, Shape]]) -> None:
    """Adds a target's shapes to the table; a length whose shape is the one before is left out."""
    table = json.loads(blocks.TABLE.read_text())
    for which, at in found.items():
        changes = {
            str(length): list(shape)
            for before, (length, shape) in zip((None, *at.values()), at.items(), strict=False)
            if shape != before
        }
        table.setdefault(target, {}).setdefault(which, {})[str(head_dim)] = changes
    lines = json.dumps(table, indent=1, sort_keys=True)
    blocks.TABLE.write_text(lines + '\n')
