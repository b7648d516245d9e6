"""Predicts how long each operation of an optimised program takes, from its schedule.

XLA's own operations are read as kernels are (schedule.py): the cycles of one turn of an operation's
loop times the turns that its `iteration_bounds` announce, or what its bytes in HBM take if that is
longer. The `estimated_cycles` that XLA writes beside them steer its choices and are no times: twice
the schedule for a plain matmul on v6e, ten times for elementwise work. Copies between HBM and VMEM
that run beside other work count as bytes, not as time.
"""

import math
import re
from typing import Any, NamedTuple

from helios_jax.chips import Chip
from helios_jax.plan.compiler.program import (
    INSTRUCTION,
    Instruction,
    hbm_bytes,
    instructions,
    split,
)
from helios_jax.plan.compiler.schedule import Schedule

FREE = ('parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element')


class Operation(NamedTuple):
    """An instruction of the optimised program that takes time."""

    name: str
    opcode: str
    kernel: bool  # Pallas made it
    times: float  # number of runs in one run of the program
    seconds: float  # time of one run; 0 for a kernel, whose time is not known here
    hbm_bytes: float  # operands and results that are not in VMEM
    vmem_bytes: int  # VMEM that it allocates while it runs


def read(hlo: str, schedules: dict[str, Schedule], chip: Chip) -> list[Operation]:
    """Lists the operations that an optimised module runs, those of its loops included."""
    entry, computations = split(hlo)
    twins = alike(computations, schedules)
    return [
        operation(instruction, schedules, twins, chip)
        for instruction in instructions(entry, computations)
        if instruction.opcode not in FREE and not instruction.opcode.endswith('-done')
    ]


def alike(
    computations: dict[str, list[str]], schedules: dict[str, Schedule]
) -> dict[tuple[str, ...], Schedule]:
    """Finds schedules by likeness: libtpu schedules one of several operations that are alike."""
    return {
        likeness(*match.groups()[1:]): schedules[match[1]]
        for texts in computations.values()
        for text in texts
        if (match := INSTRUCTION.match(text)) and match[1] in schedules
    }


def operation(
    instruction: Instruction, schedules: dict[str, Schedule], twins: dict[Any, Schedule], chip: Chip
) -> Operation:
    """Predicts what one run of an instruction takes, by its own schedule or a twin's."""
    name, shape, opcode, text = instruction[:4]
    moved = hbm_bytes(shape) + sum(map(hbm_bytes, instruction.operands))
    seconds = 0.0
    if not instruction.kernel and not opcode.endswith('-start'):
        code = schedules.get(name) or twins.get(likeness(shape, opcode, text))
        cores = chip.num_cores if 'megacore_split_dim' in text else 1
        # What libtpu does not schedule, such as a copy by DMA, takes what its bytes take.
        cycles = turned(code, text) / cores if code else 0.0
        seconds = max(cycles / chip.clock, moved / chip.hbm_bytes_per_second)
    scoped = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', text)
    vmem = sum(map(int, re.findall(r'"size":"(\d+)"', scoped[1]))) if scoped else 0
    return Operation(name, opcode, instruction.kernel, instruction.times, seconds, moved, vmem)


def likeness(shape: str, opcode: str, text: str) -> tuple[str, ...]:
    """Returns what an instruction shares with those that are compiled to the same code."""
    bounds = re.search(r'"iteration_bounds":\[[^\]]*\]', text)
    estimate = re.search(r'"estimated_cycles":"\d+"', text)
    in_memory = shape.replace('S(1)', '')
    return opcode, in_memory, bounds[0] if bounds else '', estimate[0] if estimate else ''


def turned(operation: Schedule, text: str) -> int:
    """Counts the cycles of an operation whose outermost loop turns as often as its text says."""
    bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', text)
    turns = math.prod(map(int, re.findall(r'\d+', bounds[1]))) if bounds else 1
    grid = operation.grid
    if grid is operation.code:
        return grid.total
    return operation.code.total + (turns - 1) * grid.total
