"""Compiles a function for a TPU, and adds up what the program does around its Pallas kernels.

XLA's own operations are read as the kernels are, from their schedules (schedule.py): the cycles
of one turn of an operation's loop times the turns that its `iteration_bounds` announce, or what its
bytes in HBM take if that is longer. The `estimated_cycles` that XLA writes beside them steer its
choices and are no times: twice the schedule for a plain matmul on v6e, ten times for elementwise
work. Copies between HBM and VMEM that run beside other work count as bytes, not as time.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Format, Layout

from helios_jax.bench.tpu import schedule
from helios_jax.bench.tpu.schedule import Schedule
from helios_jax.chips import Chip
from helios_jax.parallel import mesh as meshes
from helios_jax.plan.compiler.program import (
    INSTRUCTION,
    Instruction,
    hbm_bytes,
    instructions,
    split,
)

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


class Program(NamedTuple):
    """A compiled program: its operations, and the schedule of each one by name."""

    operations: list[Operation]
    schedules: dict[str, Schedule]
    temp_bytes: int

    @property
    def kernels(self) -> list[Operation]:
        return [operation for operation in self.operations if operation.kernel]

    @property
    def seconds(self) -> float:
        """Adds up the time of everything but the Pallas kernels."""
        return sum(o.times * o.seconds for o in self.operations if not o.kernel)

    @property
    def hbm_bytes(self) -> float:
        """Adds up what everything but the Pallas kernels reads and writes."""
        return sum(o.times * o.hbm_bytes for o in self.operations if not o.kernel)


def compile_here(
    function: Callable[..., Any],
    arguments: tuple,
    chip: Chip,
    *,
    scoped_vmem_mib: int = 0,
) -> Program:
    """Compiles for one device; layouts of arguments and results are the compiler's choice.

    Must be called once in a process, before anything else loads libtpu, which then reads its flags.

    Args:
      arguments: arrays or their shapes and dtypes.
      scoped_vmem_mib: what one operation may allocate, where it does not say; 0: the default.
    Raises:
      UserError: libtpu is missing.
    """
    with tempfile.TemporaryDirectory(prefix='helios_schedules_') as directory:
        others = os.environ.get('LIBTPU_INIT_ARGS', '')
        os.environ['LIBTPU_INIT_ARGS'] = f'{others} {schedule.flags(Path(directory))}'
        mesh = jax.sharding.Mesh(meshes.topology_devices(chip.topology)[:1], 'x')
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        anyhow: Any = Format(Layout.AUTO, whole)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        jitted = jax.jit(function, in_shardings=anyhow, out_shardings=anyhow)
        limit: Any = {'xla_tpu_scoped_vmem_limit_kib': f'{scoped_vmem_mib * 1024}'}
        # The mesh tells what is traced which TPU it is for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jitted.lower(*shapes)
        compiled = lowered.compile(limit if scoped_vmem_mib else None)
        schedules = schedule.read(Path(directory), chip.delay_slots)
    memory: Any = compiled.memory_analysis()
    operations = read(compiled.as_text() or '', schedules, chip)
    return Program(operations, schedules, memory.temp_size_in_bytes)


def read(hlo: str, schedules: dict[str, Schedule], chip: Chip) -> list[Operation]:
    """Lists the operations that an optimised module runs, those of its loops included."""
    entry, computations = split(hlo)
    # libtpu schedules one of several operations that are alike.
    twins = {
        likeness(*match.groups()[1:]): schedules[match[1]]
        for texts in computations.values()
        for text in texts
        if (match := INSTRUCTION.match(text)) and match[1] in schedules
    }
    return [
        operation(instruction, schedules, twins, chip)
        for instruction in instructions(entry, computations)
        if instruction.opcode not in FREE and not instruction.opcode.endswith('-done')
    ]


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
