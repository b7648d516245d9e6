"""Lists what checkpoints a directory has, and what is wrong with them."""

from typing import Any

from etils import epath

from helios_jax.checkpoint import layout, read
from helios_jax.errors import UserError


def list_steps(directory: epath.PathLike, *, verify: bool = True) -> list[dict[str, Any]]:
    """Lists each step's `step`, `files`, `bytes`, `time` (ISO, UTC), `metrics` and `damage`.

    `damage` is '' for an intact step. It reads every byte, the tokenizer's too; without `verify` it
    is left out. May be called while a run writes.
    """
    directory = layout.absolute(directory)
    layout.require_directory(directory)
    layout.warn_of_incomplete(directory)
    rows = [describe_step(directory, step, verify=verify) for step in layout.committed(directory)]
    return [row for row in rows if row]


def describe_step(directory: epath.Path, step: int, *, verify: bool = True) -> dict[str, Any]:
    """Returns a step's row of `list_steps`; {} if a run has let the step go meanwhile."""
    row: dict[str, Any] = {'step': step, 'files': 0, 'bytes': 0, 'time': '', 'metrics': {}}
    damage = ''
    try:
        opened = read.open_number(directory, step)
        row['files'] = len(opened.files)
        row['bytes'] = sum(size for size, _ in opened.files.values())
        row |= {name: opened.metadata[name] for name in ('time', 'metrics')}
        if verify:
            damage = opened.fault(opened.folders) or opened.tokenizer_damage()
    except UserError as error:
        damage = str(error)
    if not layout.is_committed(directory, step):
        return {}
    return row | ({'damage': damage} if verify else {})
