"""Writes checkpoints asynchronously, and deletes old ones."""

import contextlib
import datetime
import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from helios_jax.checkpoint import layout, manifest, read
from helios_jax.errors import UserError, require
from helios_jax.parallel import agreement

log = logging.getLogger(__name__)

_COMMIT_SECONDS = 3600  # from the call of save to the commit, hashing included
# Each chunk of an array is decompressed by one thread, each file hashed by one: many of either keep
# all cores busy. By itself Orbax writes a whole array as one chunk, and files of 2 GB.
_CHUNK_BYTES = 2**26
_FILE_BYTES = 2**28


class Checkpoints:
    """The writer of one directory; one save is in flight at a time.

    There must be no other writer: see `train.lock`. Nothing on disk changes before the first save,
    which makes the directory and removes what interrupted saves and deletions left there.

    Args:
      keep: newest steps to keep; the one with the lowest `read.BEST_METRIC` is kept besides.
    Raises:
      UserError: the directory holds numbered folders that are not Helios checkpoints.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f'keep={keep} must be 1 or more.')
        self.directory = layout.absolute(directory)
        self._keep = keep
        self._saving: int | None = None
        self._damaged: dict[int, str] = {}  # steps that were hashed and found so
        layout.require_ours(self.directory)
        import orbax.checkpoint as ocp  # half a second, which who only reads need not wait for

        options = ocp.options.AsyncOptions(
            timeout_secs=_COMMIT_SECONDS, post_finalization_callback=self._write_manifest
        )
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=options
        )

    def save(
        self,
        step: int,
        items: dict[str, PyTree],
        metadata: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts to save a step; the arrays may be donated or changed as soon as this returns.

        Args:
          items: trees of arrays, each of which is restored by its name.
          metadata: whatever else a reader needs, as JSON.
          metrics: held-out figures of this step, by which `best` chooses.
        Raises:
          UserError: this save or the one before failed, or the step exists already.
        """
        self.wait()
        with agreement.together():
            if jax.process_index() == 0:
                layout.claim(self.directory)
                self._remove_leftovers()
                self._make_way(step)
                if manifest.is_remote(self.directory):  # where Orbax writes to the final name
                    layout.unfinished(self.directory, step).write_text('')
        arrays = {name: layout.flatten(tree) for name, tree in items.items()}
        import orbax.checkpoint as ocp

        saves = {name: save_arguments(leaves) for name, leaves in arrays.items()}
        saves[layout.METADATA] = ocp.args.JsonSave(record(step, arrays, metadata, metrics or {}))
        self._saving = step
        try:
            self._writer.save(self.directory / str(step), ocp.args.Composite(**saves))
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until the save in flight is committed, then deletes what `keep` lets go.

        Raises:
          UserError: the save failed. Earlier steps are untouched, its leftovers are removed.
        """
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        if self._saving is not None:
            step, self._saving = self._saving, None
            if jax.process_index() == 0:
                layout.unfinished(self.directory, step).unlink(missing_ok=True)
                self._delete_old()

    def close(self) -> None:
        """Waits, then releases the threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def steps(self) -> list[int]:
        """Lists the committed steps, oldest first."""
        return layout.committed(self.directory)

    def _write_manifest(self) -> None:
        # Orbax calls this on process 0, with every file complete and the folder not yet renamed.
        prefix = f'{self._saving}.'
        unnamed = [
            path
            for path in self.directory.iterdir()
            if path.name.startswith(prefix) and layout.is_temporary(path.name)
        ]
        (folder,) = unnamed or [self.directory / str(self._saving)]
        manifest.write(folder)

    def _failed(self, error: Exception) -> UserError:
        step, self._saving = self._saving, None
        with contextlib.suppress(Exception):
            self._writer.wait_until_finished()  # what else of the failed save is being written
        if jax.process_index() == 0:
            self._remove_leftovers()
        cause = f'{type(error).__name__}: …{str(error).partition(chr(10))[0][-120:]}'
        return UserError(
            f'checkpoint {self.directory / str(step)} could not be saved ({cause}); free some '
            'space or choose another directory. Earlier steps are intact.'
        )

    def _make_way(self, step: int) -> None:
        """Moves a damaged step aside, so that a run which went back before it can write it again.

        Raises:
          UserError: this step or a later one exists and is intact; something of this name is no
            checkpoint.
        """
        for other in [each for each in self.steps() if each >= step]:
            damage = self._damaged.get(other) or read.damage_of(self.directory, other)
            require(
                bool(damage),
                f'checkpoint {self.directory / str(other)} exists already, and step {step} is not '
                'after it; continue from it, or choose another directory.',
            )
            self._damaged[other] = damage
        folder = layout.folder(self.directory, step)
        if damage := self._damaged.pop(step, ''):
            aside = _unused(self.directory / f'{step}.damaged')
            log.warning('%s is damaged (%s): it is now %s.', folder, damage, aside.name)
            folder.rename(aside)
        require(not folder.exists(), layout.in_the_way(folder))

    def _delete_old(self) -> None:
        steps = self.steps()
        kept = {*steps[-self._keep :], *read.ranked(self.directory)[:1]}
        for step in steps:
            if step not in kept:
                try:
                    delete_step(self.directory, step)
                except OSError as error:  # such as a reader's open files on NFS
                    log.warning('Step %d is left for the next save to remove (%s).', step, error)

    def _remove_leftovers(self) -> None:
        """Removes what our interrupted saves and deletions left, and logs it."""
        for path in list(self.directory.iterdir()):
            step = layout.unfinished_step(path)
            try:
                if path.is_dir() and (layout.is_temporary(path.name) or step is not None):
                    log.info('Removing %s, left by an interrupted save or deletion.', path)
                    path.rmtree()
                elif step is not None:
                    folder = layout.folder(self.directory, step)
                    if folder.exists() and not layout.is_committed(self.directory, step):
                        log.info('Removing %s, left half saved or half deleted.', folder)
                        folder.rmtree()
                    path.unlink()
            except OSError as error:  # a thread of a failed save may write into it yet
                log.warning('%s is left for the next save to remove (%s).', path, error)


def record(
    step: int,
    arrays: dict[str, dict[str, Any]],
    metadata: dict[str, Any],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Returns the metadata of a step, as it is written: the caller's, and what readers look for."""
    return {
        **metadata,
        'format_version': layout.FORMAT_VERSION,
        'step': step,
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'metrics': metrics,
        'arrays': {name: layout.describe(leaves) for name, leaves in arrays.items()},
    }


def save_arguments(leaves: dict[str, Any], cut: Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """Returns how Orbax is to save an item's arrays.

    Args:
      cut: axes of some arrays along which a chunk has one index.
    """
    import orbax.checkpoint as ocp

    def one(name: str) -> Any:
        axes = (cut or {}).get(name, ())
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)

    return ocp.args.PyTreeSave(
        leaves,
        save_args={name: one(name) for name in leaves},
        ocdbt_target_data_file_size=_FILE_BYTES,
    )


def delete_step(directory: epath.Path, step: int) -> None:
    """Deletes a whole step; the caller is the directory's one writer."""
    folder, unfinished = (of(directory, step) for of in (layout.folder, layout.unfinished))
    if not manifest.is_remote(folder):
        folder.rename(unfinished)  # at once, and on a full disk too
        unfinished.rmtree()
        return
    unfinished.write_text('')
    (folder / manifest.NAME).unlink()  # first: half a step never counts as one
    folder.rmtree()
    unfinished.unlink()


def _unused(path: epath.Path) -> epath.Path:
    number = 2
    unused = path
    while unused.exists():
        unused, number = path.parent / f'{path.name}.{number}', number + 1
    return unused
