"""Removes old steps of a run, as its one writer."""

import logging
from collections.abc import Iterator, Sequence

from etils import epath

from helios_jax import checkpoint
from helios_jax.ckpt import places
from helios_jax.errors import require
from helios_jax.train import lock

log = logging.getLogger(__name__)


def prune(
    directory: epath.Path, *, keep: int = 0, steps: Sequence[int] = (), dry_run: bool = False
) -> Iterator[tuple[int, int]]:
    """Removes steps of a checkpoint directory under its run's lock; yields each and its bytes.

    Args:
      keep: newest intact steps to keep, and the best besides; damaged ones among them are left.
      steps: or steps to remove, the best or damaged ones too.
      dry_run: yields what would be removed, and removes nothing.
    Raises:
      UserError: another process writes there; a step that is not there; no intact step would be
        left.
    """
    if dry_run:
        for step in doomed(directory, keep, steps):
            yield step, size(directory, step)
        return
    with lock.hold(places.workdir_of(directory)) as held:
        chosen = doomed(directory, keep, steps)
        if chosen:
            held.begin()
        for step in chosen:
            num_bytes = size(directory, step)
            held.check()
            checkpoint.delete_step(directory, step)
            yield step, num_bytes


def doomed(directory: epath.Path, keep: int, steps: Sequence[int]) -> list[int]:
    """Lists the steps to remove, oldest first."""
    there = checkpoint.committed(directory)
    intact = lambda step: not checkpoint.damage_of(directory, step)
    if not steps:
        best = next(filter(intact, checkpoint.ranked(directory)), None)
        kept, left = 0, []
        for step in reversed(there):
            if kept == keep:
                break
            left.append(step)
            if damage := checkpoint.damage_of(directory, step):
                log.warning('Step %d is damaged (%s), and left; --steps removes it.', step, damage)
            kept += not damage
        return [step for step in there if step not in (*left, best)]
    for step in steps:
        require(
            step in there,
            f'step {step} is not in {directory}, which holds {", ".join(map(str, there))}.',
        )
    require(
        any(intact(step) for step in reversed(there) if step not in steps),
        f'no intact checkpoint would be left in {directory}; name fewer steps.',
    )
    return sorted({*steps})


def size(directory: epath.Path, step: int) -> int:
    """Bytes of a step's files by its manifest; 0 if that cannot be read."""
    return int(checkpoint.describe_step(directory, step, verify=False)['bytes'])
