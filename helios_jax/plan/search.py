"""Searches many configurations by closed form: policies × batches × meshes."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from helios_jax import config
from helios_jax.arch.rules import BATCH_AXES
from helios_jax.chips import GIB, Chip
from helios_jax.errors import UserError, require
from helios_jax.plan.changes import Change, memories
from helios_jax.plan.planning import Plan, largest_rows, mesh_shape, plan

MICROBATCHES = (1, 2, 4)
NEAR = 0.01  # relative difference in tokens/s that still counts as equal


def search(cfg: config.Config, chip: Chip, num_devices: int) -> list[Change]:
    """Ranks what fits by predicted tokens/s: policies × rows and microbatches × meshes.

    The batch of a step may grow or shrink: rows of a device are powers of two up to what fits. For
    each mesh and policy the smallest batch that is as good as the fastest is shown.
    """
    best = []
    for mesh, memory in itertools.product(_meshes(cfg, num_devices), memories(cfg.memory)):
        tried = dataclasses.replace(cfg, mesh=mesh, memory=memory)
        found = [
            change
            for microbatches in MICROBATCHES
            for change in _rows(tried, cfg, microbatches, chip, num_devices)
        ]
        speed = max((c.plan.seconds.tokens_per_second for c in found), default=0.0)
        near = [c for c in found if c.plan.seconds.tokens_per_second > (1 - NEAR) * speed]
        best += sorted(near, key=lambda c: (c.plan.config.train.batch_rows, c.plan.memory.peak))[:1]
    return sorted(best, key=lambda c: -c.plan.seconds.tokens_per_second)


def resolve_auto(cfg: config.Config, chip: Chip, num_devices: int) -> config.Memory:
    """Resolves memory.policy='auto' for these devices: the fastest preset that fits.

    Raises:
      UserError: none does.
    """
    tried, refused = [], None
    for memory in memories(cfg.memory):
        try:
            tried.append(plan(dataclasses.replace(cfg, memory=memory), chip, num_devices))
        except UserError as error:
            refused = error
    if refused and not tried:
        raise refused
    fitting = [made for made in tried if made.fits]
    least = min(made.memory.peak for made in tried)
    require(
        bool(fitting),
        f"memory.policy='auto': no preset fits {num_devices} {chip.name}; the smallest needs "
        f'{least / GIB:.1f} of {chip.hbm_bytes / GIB:.1f} GiB a device. Take fewer rows, more '
        'train.microbatches or more devices (`helios plan` names what would do).',
    )
    return min(fitting, key=lambda made: made.seconds.step).config.memory


def _meshes(cfg: config.Config, num_devices: int) -> Iterator[config.Mesh]:
    """Yields the config's own axes, and all splits of the devices over fsdp, data, expert, tensor.

    Slices and context stay: they follow from the machine and the row's length.
    """
    shape = mesh_shape(cfg, num_devices)
    left = num_devices // shape['slice'] // shape['context']
    experts = cfg.model.moe.num_experts or 1
    for tensor, expert in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if left % (tensor * expert) or experts % expert:
            continue
        rest = left // tensor // expert
        for fsdp in (rest, *(f for f in (8, 16, 32, 64) if f < rest and rest % f == 0)):
            sizes = {'data': rest // fsdp, 'fsdp': fsdp, 'expert': expert, 'tensor': tensor}
            # The config's own mesh keeps the -1 that it was written with.
            yield cfg.mesh if shape | sizes == shape else config.Mesh(**(shape | sizes))


def _rows(
    cfg: config.Config, original: config.Config, microbatches: int, chip: Chip, num_devices: int
) -> Iterator[Change]:
    """Yields plans by rows of a device's microbatch: powers of two that fit, and the most."""
    shape = mesh_shape(cfg, num_devices)
    sharded = math.prod(shape[axis] for axis in BATCH_AXES)
    start = {'train.microbatches': microbatches, 'train.batch_rows': microbatches * sharded}
    cfg = config.replace(cfg, start)
    try:
        most = min(largest_rows(cfg, chip, num_devices), 64)
    except UserError:
        return
    for rows in {2**i for i in range(7) if 2**i <= most} | ({most} if most else set()):
        grown = config.replace(cfg, {'train.batch_rows': rows * microbatches * sharded})
        made = plan(grown, chip, num_devices)
        yield Change(_overrides(original, made), made)


def _overrides(original: config.Config, made: Plan) -> tuple[str, ...]:
    """Lists what differs from the config, as overrides on the command line."""
    found = []
    for section in ('memory', 'mesh', 'train'):
        old, new = getattr(original, section), getattr(made.config, section)
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                found.append(f'--config.{section}.{field.name}={value}')
    return tuple(found)
