"""Names and places of files in a checkpoint directory, for the writer and the readers."""

import contextlib
import json
import logging
import re
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from helios_jax.checkpoint import manifest
from helios_jax.errors import UserError, require

log = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 1: manifests without a digest of their own, tokenizers without one
MARKER = 'helios_checkpoints.json'
METADATA = 'metadata'
# STEP.unfinished is what a local step is renamed to before it is deleted. Object stores cannot
# rename: there it is a file which says that STEP is being saved or deleted.
UNFINISHED = '.unfinished'
_TEMPORARY = re.compile(r'([0-9]+)\.orbax-checkpoint-tmp.*')


def tokenizer_directory(directory: epath.PathLike) -> epath.Path:
    """Directory of the tokenizer's files, which travel with the checkpoints."""
    return absolute(directory) / 'tokenizer'


def absolute(directory: epath.PathLike) -> epath.Path:
    path = epath.Path(directory)
    return path if manifest.is_remote(path) else path.expanduser().resolve()


def is_step(name: str) -> bool:
    """True if a step's folder can have this name: 40, but not 040, ٤٠ or 4²."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def is_temporary(name: str) -> bool:
    """True if this is the name that Orbax gives to an unfinished save of one of our steps."""
    found = _TEMPORARY.fullmatch(name)
    return bool(found) and is_step(found[1])  # type: ignore[index]


def require_ours(directory: epath.Path) -> None:
    """Refuses a directory without our mark that holds folders which look like our steps.

    Raises:
      UserError: names the first such folder.
    """
    if (directory / MARKER).exists() or not directory.exists():
        return
    foreign = sorted(path.name for path in directory.iterdir() if is_step(path.name))
    require(
        not foreign,
        f'{directory} holds folder {", ".join(foreign[:1])} but is no Helios checkpoint '
        'directory; choose another, nothing there is written over.',
    )


def claim(directory: epath.Path) -> None:
    """Marks a directory as ours, having made it if need be."""
    if not (directory / MARKER).exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MARKER).write_text(json.dumps({'format_version': FORMAT_VERSION}))


def require_directory(directory: epath.Path) -> None:
    require(directory.exists(), f'checkpoint directory {directory} does not exist.')
    require(
        (directory / MARKER).exists(),
        f'{directory} is not a checkpoint directory of Helios (it has no {MARKER}); give the one '
        'that `helios train` wrote.',
    )


def committed(directory: epath.Path) -> list[int]:
    """Lists the steps that have a manifest, oldest first."""
    return [step for step in _numbered(directory) if is_committed(directory, step)]


def incomplete(directory: epath.Path) -> list[int]:
    """Lists the steps that have no manifest and are not being saved or deleted."""
    return [
        step
        for step in _numbered(directory)
        if not is_committed(directory, step)
        and not unfinished(directory, step).exists()
        and folder(directory, step).exists()
    ]


def warn_of_incomplete(directory: epath.Path) -> None:
    for step in incomplete(directory):
        log.warning(
            '%s has no %s and is passed over: it was copied in part, or is no checkpoint.',
            folder(directory, step),
            manifest.NAME,
        )


def is_committed(directory: epath.Path, step: int) -> bool:
    return (folder(directory, step) / manifest.NAME).exists()


def folder(directory: epath.Path, step: int) -> epath.Path:
    return directory / str(step)


def unfinished(directory: epath.Path, step: int) -> epath.Path:
    return directory / f'{step}{UNFINISHED}'


def unfinished_step(path: epath.Path) -> int | None:
    """Reads the step from a file name STEP.unfinished; None for any other file."""
    name = path.name.removesuffix(UNFINISHED)
    return int(name) if path.name.endswith(UNFINISHED) and is_step(name) else None


def in_the_way(path: epath.Path) -> str:
    """Message that refuses to write where something lies that is no checkpoint."""
    return (
        f'{path} is in the way of checkpoint {path.name}: it has no {manifest.NAME}, so it was '
        'copied in part or is no checkpoint; complete it, or move it away.'
    )


def flatten(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), 'two leaves share a name'
    return flat


def describe(leaves: dict[str, Any]) -> dict[str, str]:
    """Maps each array's name to its dtype and shape, such as `float32[3, 5]`."""
    return {name: f'{np.dtype(leaf.dtype)}{list(leaf.shape)}' for name, leaf in leaves.items()}


def parse_description(text: str) -> tuple[tuple[int, ...], np.dtype]:
    """Reads the shape and the dtype of one array from its text of `describe`.

    Raises:
      UserError: it is no such text.
    """
    if found := re.fullmatch(r'(\w+)(\[[0-9, ]*\])', text):
        with contextlib.suppress(TypeError, ValueError):
            return tuple(json.loads(found[2])), np.dtype(found[1])
    raise UserError(f'an array is {text!r:.80} by its metadata, which no array is.')


def _numbered(directory: epath.Path) -> list[int]:
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if is_step(name))
