"""Writes checkpoints, asynchronously, and lets old ones go."""

import contextlib
import datetime
import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from helios_jax.checkpoint import layout, manifest, read
from helios_jax.errors import UserError, require

log = logging.getLogger(__name__)

_TEMPORARY = '.orbax-checkpoint-tmp'
_COMMIT_SECONDS = 3600  # from the call of save to the commit, hashing included


class Checkpoints:
    """The writer of one directory; one save is in flight at a time.

    Args:
      directory: created if absent; leftovers of interrupted saves in it are removed.
      keep: newest steps to keep; the one with the lowest `best_metric` is kept besides.
      best_metric: key of the metrics given to `save`.
    Raises:
      UserError: the directory holds numbered folders that are not Helios checkpoints.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep: int, best_metric: str = 'bits_per_byte'
    ) -> None:
        if keep < 1:
            raise ValueError(f'keep={keep} must be 1 or more.')
        self.directory = layout.absolute(directory)
        self._keep = keep
        self._best_metric = best_metric
        self._saving: int | None = None
        options = ocp.options.AsyncOptions(
            timeout_secs=_COMMIT_SECONDS, post_finalization_callback=self._write_manifest
        )
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=options
        )
        layout.claim(self.directory)
        self._remove_leftovers()
        layout.barrier('checkpoints_opened')

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
        self._remove_leftovers()
        self._make_way(step)
        arrays = {name: layout.flatten(tree) for name, tree in items.items()}
        record = {
            **metadata,
            'format_version': layout.FORMAT_VERSION,
            'step': step,
            'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'metrics': metrics or {},
            'arrays': {name: layout.describe(leaves) for name, leaves in arrays.items()},
        }
        parts = {name: ocp.args.StandardSave(leaves) for name, leaves in arrays.items()}
        parts[layout.METADATA] = ocp.args.JsonSave(record)
        self._saving = step
        try:
            self._writer.save(self.directory / str(step), ocp.args.Composite(**parts))
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
            self._saving = None
            self._delete_old()

    def close(self) -> None:
        """Waits, then releases the threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return layout.committed(self.directory)

    def latest(self) -> int | None:
        """The newest step whose files are intact; None if there is none at all."""
        return read.resolve(self.directory, 'latest') if self.steps() else None

    def best(self) -> int | None:
        """The intact step of the lowest metric; None if no step has the metric."""
        ranked = layout.ranked(self.directory, self._best_metric)
        return layout.first_intact(self.directory, ranked) if ranked else None

    def _write_manifest(self) -> None:
        # Orbax calls this on process 0, with every file complete and the folder not yet renamed.
        prefix = f'{self._saving}{_TEMPORARY}'
        unnamed = [path for path in self.directory.iterdir() if path.name.startswith(prefix)]
        (folder,) = unnamed or [self.directory / str(self._saving)]
        manifest.write(folder)

    def _failed(self, error: Exception) -> UserError:
        step, self._saving = self._saving, None
        with contextlib.suppress(Exception):
            self._writer.wait_until_finished()  # what else of the failed save is being written
        self._remove_leftovers()
        cause = f'{type(error).__name__}: …{str(error).partition(chr(10))[0][-120:]}'
        return UserError(
            f'checkpoint {self.directory / str(step)} could not be saved ({cause}); free some '
            'space or choose another directory. Earlier steps are intact.'
        )

    def _make_way(self, step: int) -> None:
        """Removes damaged steps that a run which fell back to an earlier one writes again."""
        for other in reversed([s for s in self.steps() if s >= step]):
            damage = manifest.damage(self.directory / str(other))
            require(
                bool(damage),
                f'checkpoint {self.directory / str(other)} exists already, and step {step} is not '
                'after it; continue from it, or choose another directory.',
            )
            log.warning('Removing damaged checkpoint %s (%s).', other, damage)
            self._delete(other)
        layout.barrier('checkpoint_way_made')

    def _delete_old(self) -> None:
        steps = self.steps()
        kept = {*steps[-self._keep :], *layout.ranked(self.directory, self._best_metric)[:1]}
        for step in steps:
            if step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        if jax.process_index() == 0:
            folder = self.directory / str(step)
            (folder / manifest.NAME).unlink()  # first, so that half a step never counts as one
            folder.rmtree()

    def _remove_leftovers(self) -> None:
        for path in self.directory.iterdir() if jax.process_index() == 0 else ():
            unfinished = path.name.isdigit() and not (path / manifest.NAME).exists()
            if unfinished or _TEMPORARY in path.name:
                try:
                    path.rmtree()
                except OSError as error:  # a thread of a failed save may write into it yet
                    log.warning('%s is left for the next save to remove (%s).', path, error)
