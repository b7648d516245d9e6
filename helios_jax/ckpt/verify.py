"""Hashes checkpoints against their manifests."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from helios_jax import checkpoint
from helios_jax.errors import require


def verify(directory: epath.Path, step: int = -1) -> Iterator[dict[str, Any]]:
    """Yields a row for each step: `step`, `files`, `bytes` and `damage` ('' if it is intact).

    Every file of a manifest is read, and the tokenizer's files. A folder that is called as a step
    and has no manifest is damaged too. A run may write meanwhile.

    Args:
      step: the only one to verify; -1 takes all.
    Raises:
      UserError: no such step.
    """
    without = checkpoint.incomplete(directory)
    steps = sorted([*checkpoint.committed(directory), *without])
    require(
        step in (-1, *steps),
        f'step={step} is not in {directory}, which holds {", ".join(map(str, steps)) or "none"}.',
    )
    for each in steps if step == -1 else [step]:
        if each in without:
            damage = 'it has no manifest.json: copied in part, or no checkpoint'
            yield {'step': each, 'files': 0, 'bytes': 0, 'damage': damage}
        elif row := checkpoint.describe_step(directory, each):
            yield {name: row[name] for name in ('step', 'files', 'bytes', 'damage')}
