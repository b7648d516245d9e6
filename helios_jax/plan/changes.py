"""Finds changes that make a plan fit: the fastest ones, as command-line overrides."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from helios_jax import config
from helios_jax.chips import Chip
from helios_jax.errors import UserError
from helios_jax.memory import policy
from helios_jax.plan.planning import Plan, plan

# Presets in the order of the work that they add; each is exact but for those that say fp8.
PRESETS = ('minimal', 'fp8', 'full', 'offload', 'fp8_offload')
assert set(PRESETS) == set(policy.PRESETS)


PARTS = 4  # slices to try for memory.backward_parts; more than 4 save little


class Change(NamedTuple):
    overrides: tuple[str, ...]  # such as --config.memory.policy=fp8
    plan: Plan


def cheapest(cfg: config.Config, chip: Chip, num_devices: int, count: int = 3) -> list[Change]:
    """Finds the changes that make a config fit, fastest first: one override each, else two."""
    single = list(_single(cfg, num_devices))
    found = [c for change in single if (c := _try(cfg, [change], chip, num_devices))]
    if len(found) < count:
        pairs = itertools.combinations(single, 2)
        found += [c for pair in pairs if (c := _try(cfg, list(pair), chip, num_devices))]
    kept: list[Change] = []
    for change in sorted(found, key=lambda c: c.plan.seconds.step):
        # A pair that one of its halves makes needless is no answer of its own.
        if not any(set(k.overrides) < set(change.overrides) for k in found):
            kept.append(change)
    return kept[:count]


def memories(memory: config.Memory) -> list[config.Memory]:
    """Lists every preset, and once more in parts those that can run their backward pass so.

    The user's own actions are kept under each of them.
    """
    found = []
    for preset, parts in itertools.product(PRESETS, sorted({memory.backward_parts, 1, PARTS})):
        changed = dataclasses.replace(memory, policy=preset, backward_parts=parts)
        try:
            policy.actions(changed)
        except UserError:
            continue
        found.append(changed)
    return found


def _single(cfg: config.Config, num_devices: int) -> Iterator[tuple[str, object]]:
    """Yields (dotted name, value) of each setting worth trying."""
    for preset in PRESETS:
        if preset != cfg.memory.policy and not policy.chosen_actions(cfg.memory):
            yield 'memory.policy', preset
    if cfg.memory.backward_parts == 1:
        yield 'memory.backward_parts', PARTS
    for times in (2, 4, 8, 16):
        yield 'train.microbatches', cfg.train.microbatches * times
    if cfg.memory.optimizer == 'device':
        yield 'memory.optimizer', 'host'
    if cfg.memory.parameters == 'device':
        yield 'memory.parameters', 'host'
    for axis, other in itertools.permutations(('data', 'fsdp', 'expert', 'context', 'tensor'), 2):
        # One axis takes what another has; the other becomes what is left.
        size = getattr(cfg.mesh, axis)
        if size == 1 and getattr(cfg.mesh, other) == -1:
            yield from ((f'mesh.{axis}', n) for n in (2, 4, 8, 16) if num_devices % n == 0)


def _try(
    cfg: config.Config, changes: list[tuple[str, object]], chip: Chip, num_devices: int
) -> Change | None:
    """Makes the plan with these changes; None if it is refused or does not fit."""
    values = dict(changes)
    if len(values) < len(changes):
        return None
    try:
        changed = plan(config.replace(cfg, values), chip, num_devices)
    except UserError:
        return None
    overrides = tuple(f'--config.{name}={value}' for name, value in changes)
    return Change(overrides, changed) if changed.fits else None
