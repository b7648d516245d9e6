"""Finds the checkpoints that a path names, and a place for those that are made of them."""

import contextlib
from collections.abc import Iterator

from etils import epath

from helios_jax import checkpoint, restoring
from helios_jax.errors import require


def directory_of(path: epath.PathLike) -> epath.Path:
    """Finds the checkpoint directory of a run's workdir, or takes `path` for one.

    Raises:
      UserError: there is none.
    """
    found = checkpoint.absolute(restoring.checkpoint_directory(path))
    checkpoint.require_directory(found)
    return found


def opened_at(path: epath.PathLike, step: str = 'latest') -> checkpoint.Opened:
    """Opens the step that a path ends with, such as runs/tiny/checkpoints/40, or else `step`.

    Raises:
      UserError: no checkpoint there, no such step, or a damaged one.
    """
    folder = checkpoint.absolute(path)
    if folder.parent.name == 'checkpoints' and folder.name.isdecimal():
        return checkpoint.open_step(directory_of(folder.parent), folder.name)
    return checkpoint.open_step(directory_of(path), step)


def workdir_of(directory: epath.Path) -> epath.Path:
    """Returns the workdir whose lock guards a checkpoint directory."""
    return directory.parent if directory.name == 'checkpoints' else directory


@contextlib.contextmanager
def new_directory(path: str, originals: epath.Path) -> Iterator[epath.Path]:
    """Yields the checkpoint directory of a new workdir; removes all of it if the block fails.

    Args:
      path: the workdir: absent, or an empty directory.
      originals: the checkpoint directory that is read, in whose workdir nothing may be written.
    Raises:
      UserError: something is there, or it lies inside the original's workdir.
    """
    require(bool(path), '--to is missing; name a new directory for the result.')
    workdir, source = checkpoint.absolute(path), workdir_of(originals)
    require(
        not workdir.is_relative_to(source),
        f'--to={path} lies inside {source}, which is read and stays as it is; choose a place '
        'outside of it.',
    )
    was_there = workdir.exists()
    empty = not was_there or (workdir.is_dir() and not any(workdir.iterdir()))
    require(empty, f'--to={path} is there already; choose a new or an empty directory.')
    directory = workdir / 'checkpoints'
    try:
        yield directory
    except BaseException:
        left = directory if was_there else workdir
        if left.exists():
            left.rmtree()
        raise
