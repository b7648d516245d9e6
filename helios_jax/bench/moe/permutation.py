"""Predicts the permutation of rows for experts and back on a TPU: our kernels beside XLA's gather.

`take` copies each token's row to its experts, `take sums` adds up what they made of it. Rows lie in
HBM, as they do in a step. Each is compiled in a process of its own; what runs takes its schedule,
or what its bytes take if that is longer. A turn of the loop of XLA's gather makes 128 rows.
"""

from typing import Any

import jax
import jax.numpy as jnp

from helios_jax import process
from helios_jax.bench.moe.problem import GroupedProblem
from helios_jax.kernels.permutation import tpu
from helios_jax.plan.compiler import alone, timing
from helios_jax.plan.compiler.schedule import Region, Schedule

TOKENS = 16_384
TAKE, SUMS = PERMUTATIONS = 'take', 'take sums'
OURS, XLA = 'helios', 'xla'
ROWS_A_TURN = 128
Row = dict[str, Any]


def compare_rows(target: str, problem: GroupedProblem) -> list[Row]:
    """Predicts both permutations, each by ours and by XLA."""
    rows: list[Row] = []
    for what in PERMUTATIONS:
        arguments = target, what, problem.num_rows, problem.embed_dim
        found = {name: process.run(seconds_here, name, *arguments) for name in (OURS, XLA)}
        for name, seconds in found.items():
            row: Row = {'target': target, 'permutation': what, 'implementation': name}
            row |= {'num_rows': problem.num_rows, 'embed_dim': problem.embed_dim}
            row |= {'jax': jax.__version__, 'seconds': seconds}
            rows.append(row | {'times_ours': seconds / found[OURS]})
    return rows


def describe(row: Row) -> str:
    """Writes a row as a line of text."""
    ratio = f' {row["times_ours"]:.2f} × {OURS}' if row['implementation'] != OURS else ''
    return (
        f'  {row["permutation"]:14} {row["implementation"]:8} {1e3 * row["seconds"]:8.3f} ms{ratio}'
    )


def seconds_here(name: str, target: str, what: str, num_rows: int, width: int) -> float:
    """Compiles one permutation and predicts it; once in a process (`alone.compile_here`)."""
    chip, chosen = timing.CHIPS[target], num_rows // TOKENS
    sizes = (num_rows,) if what == TAKE else (TOKENS, chosen)
    # Alone, XLA would put the tokens in VMEM; from HBM a row takes as long out of more of them.
    num_read = TOKENS if (name, what) == (OURS, TAKE) else num_rows
    x = jax.ShapeDtypeStruct((num_read, width), jnp.bfloat16)

    def function(x: Any, index: Any) -> Any:
        if name == OURS:
            return (tpu.take if what == TAKE else tpu.take_sums)(x, index)
        rows = x.at[index].get(mode='clip')
        return rows if what == TAKE else rows.sum(axis=1, dtype=jnp.float32).astype(x.dtype)

    compiled = alone.compile_here(function, (x, jax.ShapeDtypeStruct(sizes, jnp.int32)), chip)
    seconds = compiled.seconds
    for one in compiled.operations:
        if not one.kernel and 'gather' not in one.name:
            continue
        schedule = compiled.schedules[one.name]
        passing = one.hbm_bytes / chip.hbm_bytes_per_second
        if tpu.PACK in one.name:
            steps = num_read // tpu.rows_a_step(width, num_read, 1, 1)
            cycles = steps * schedule.grid.total / chip.num_cores
            seconds += max(passing, cycles / chip.clock)
        elif one.kernel:
            summed = 1 if what == TAKE else chosen
            rows = tpu.rows_a_step(width, sizes[0], summed, chip.num_cores)
            step = cycles_of_a_step(schedule, rows * summed // tpu.UNROLLED)
            moved = num_rows * tpu.sublanes(width) * tpu.LANES * 4 + sizes[0] * width * timing.HALF
            cycles = sizes[0] // rows * step / chip.num_cores
            seconds += max(moved / chip.hbm_bytes_per_second, cycles / chip.clock)
        else:
            cycles = num_rows // ROWS_A_TURN * schedule.grid.total
            seconds += max(0.0, cycles / chip.clock - one.seconds)
    return seconds


def cycles_of_a_step(schedule: Schedule, turns: int) -> int:
    """Adds up a step of our kernel that copies rows: one of its two loops turns so often."""
    loops: list[Region] = [region for region in schedule.grid.walk() if region.kind == 'loop']
    first, later = loops
    return schedule.grid.total - first.total + (turns - 1) * later.total
