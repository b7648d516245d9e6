"""What lies where in a checkpoint directory, for the writer and the readers."""

import json
import logging
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from helios_jax.checkpoint import manifest
from helios_jax.errors import UserError, require

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MARKER = 'helios_checkpoints.json'
METADATA = 'metadata'


def tokenizer_directory(directory: epath.PathLike) -> epath.Path:
    """Where the tokenizer's files travel with the checkpoints."""
    return absolute(directory) / 'tokenizer'


def absolute(directory: epath.PathLike) -> epath.Path:
    path = epath.Path(directory)
    return path if '://' in str(path) else path.expanduser().resolve()


def claim(directory: epath.Path) -> None:
    """Marks a directory as ours, unless what it holds would be taken for our steps."""
    marker = directory / MARKER
    if jax.process_index() == 0 and not marker.exists():
        directory.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in directory.iterdir() if path.name.isdigit())
        require(
            not foreign,
            f'{directory} holds folder {", ".join(foreign[:1])} but is no Helios checkpoint '
            'directory; choose another, nothing there is written over.',
        )
        marker.write_text(json.dumps({'format_version': FORMAT_VERSION}))


def open_steps(directory: epath.Path) -> list[int]:
    require(directory.exists(), f'checkpoint directory {directory} does not exist.')
    require(
        (directory / MARKER).exists(),
        f'{directory} is not a checkpoint directory of Helios (it has no {MARKER}); give the one '
        'that `helios train` wrote.',
    )
    return committed(directory)


def committed(directory: epath.Path) -> list[int]:
    names = [path.name for path in directory.iterdir() if path.name.isdigit()]
    return sorted(int(name) for name in names if (directory / name / manifest.NAME).exists())


def ranked(directory: epath.Path, metric: str) -> list[int]:
    """The steps that have the metric, lowest first; of equal ones the newest first."""
    scores = {}
    for step in committed(directory):
        score = read_json(directory / str(step)).get('metrics', {}).get(metric, math.nan)
        if math.isfinite(score):
            scores[step] = score
    return sorted(scores, key=lambda step: (scores[step], -step))


def first_intact(directory: epath.Path, steps: list[int]) -> int:
    for step in steps:
        damage = manifest.damage(directory / str(step))
        if not damage:
            return step
        log.warning('CHECKPOINT %s IS DAMAGED: %s. Trying another.', directory / str(step), damage)
    raise UserError(f'every checkpoint in {directory} is damaged; see the warnings above.')


def read_json(folder: epath.Path) -> dict[str, Any]:
    """A step's metadata, {} if it cannot be read: listing must not stop at a damaged step."""
    try:
        return json.loads((folder / METADATA / 'metadata').read_text())
    except (OSError, ValueError):
        return {}


def check(folder: epath.Path, part: str) -> None:
    damage = manifest.damage(folder, part)
    require(
        not damage,
        f'checkpoint {folder} is damaged: {damage}; restore another step (see `helios ckpt ls`).',
    )


def flatten(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), 'two leaves share a name'
    return flat


def describe(leaves: dict[str, Any]) -> dict[str, str]:
    """Each array's dtype and shape, such as `float32[3, 5]`."""
    return {name: f'{np.dtype(leaf.dtype)}{list(leaf.shape)}' for name, leaf in leaves.items()}


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
