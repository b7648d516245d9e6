"""Makes a whole plan in closed form: bytes, seconds, whether it fits, how far it could grow.

Pure arithmetic on a config, the sizes of a mesh and a chip: nothing is traced or compiled, and no
JAX is loaded.
"""

import dataclasses
from collections.abc import Callable

from helios_jax import config
from helios_jax.arch import rules
from helios_jax.chips import Chip
from helios_jax.plan.peak import StepMemory, step_memory
from helios_jax.plan.placement import place
from helios_jax.plan.seconds import Seconds, step_seconds

LENGTH_STEP = 256  # tokens: a row length that kernels and chunks of the loss divide well
MOST = 2**22  # rows a device, or tokens a row, beyond which nobody looks


@dataclasses.dataclass(frozen=True)
class Plan:
    config: config.Config
    chip: Chip
    memory: StepMemory
    seconds: Seconds

    @property
    def available(self) -> float:
        """Bytes of the device's memory."""
        return self.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        return holds(self.chip, self.memory)


def plan(cfg: config.Config, chip: Chip, num_devices: int) -> Plan:
    """Plans one train step of a resolved config.

    Raises:
      UserError: the mesh does not fit the devices, or does not divide a weight or the batch.
    """
    where = place(cfg, num_devices, chip.platform)
    counted = step_memory(where)
    return Plan(cfg, chip, counted, step_seconds(where, counted, chip))


def holds(chip: Chip, counted: StepMemory) -> bool:
    """True if the step fits on the device, and in its share of the host's memory."""
    on_host = counted.host <= chip.host_bytes or chip.platform == 'cpu'
    return counted.peak <= chip.hbm_bytes and on_host


def fits(cfg: config.Config, chip: Chip, num_devices: int) -> bool:
    """True if a step of the config fits.

    Raises:
      UserError: as `plan`.
    """
    return holds(chip, step_memory(place(cfg, num_devices, chip.platform)))


def with_rows(cfg: config.Config, num_devices: int, rows: int) -> config.Config:
    """Returns the config with this many rows of a microbatch on each device."""
    shape = mesh_shape(cfg, num_devices)
    total = rows * cfg.train.microbatches
    for axis in rules.BATCH_AXES:
        total *= shape[axis]
    return config.replace(cfg, {'train.batch_rows': total})


def mesh_shape(cfg: config.Config, num_devices: int) -> dict[str, int]:
    return dict(zip(rules.MESH_AXES, rules.sizes(cfg.mesh, num_devices), strict=True))


def with_length(cfg: config.Config, length: int) -> config.Config:
    """Returns the config with rows of this many tokens, as if it had been trained at them."""
    changes = {'data.row_length': length}
    if cfg.model.rope.grows:
        changes['model.rope.trained_length'] = max(cfg.model.rope.trained_length, length)
    return config.replace(cfg, changes)


def largest_rows(cfg: config.Config, chip: Chip, num_devices: int) -> int:
    """Finds the most rows of a microbatch on each device that fit; 0: not even one."""
    return _largest(lambda rows: fits(with_rows(cfg, num_devices, rows), chip, num_devices))


def longest_row(cfg: config.Config, chip: Chip, num_devices: int) -> int:
    """Finds the longest row that fits, in steps of 256 tokens a device; 0: not even one."""
    shape = mesh_shape(cfg, num_devices)
    step = LENGTH_STEP * shape['tensor']
    step *= 2 * shape['context'] if shape['context'] > 1 else 1
    return step * _largest(lambda n: fits(with_length(cfg, n * step), chip, num_devices))


def _largest(holds: Callable[[int], bool]) -> int:
    """Finds the largest n up to `MOST` with holds(n), which stays False once it is False."""
    high = 1
    while high < MOST and holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
