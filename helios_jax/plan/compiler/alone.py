"""Compiles a function alone for a TPU, with the schedules of all that it runs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Format, Layout

from helios_jax.chips import Chip
from helios_jax.parallel import mesh as meshes
from helios_jax.plan.compiler import operations, schedule
from helios_jax.plan.compiler.operations import Operation
from helios_jax.plan.compiler.schedule import Schedule


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

    Must be called once in a process, before anything else loads libtpu (`schedule.dumped`).

    Args:
      arguments: arrays or their shapes and dtypes.
      scoped_vmem_mib: what one operation may allocate, where it does not say; 0: the default.
    Raises:
      UserError: libtpu is missing.
    """
    with schedule.dumped() as directory:
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
        schedules = schedule.read(directory, chip.delay_slots)
    memory: Any = compiled.memory_analysis()
    found = operations.read(compiled.as_text() or '', schedules, chip)
    return Program(found, schedules, memory.temp_size_in_bytes)
