"""Checkpoints: saved asynchronously and sharded by Orbax, verified by hash, restored onto any mesh.

    DIRECTORY/helios_checkpoints.json   marks the directory as ours
    DIRECTORY/tokenizer/                files that every step shares
    DIRECTORY/STEP/ITEM/                arrays of one item (params, optimizer, …)
    DIRECTORY/STEP/metadata/            JSON: format version, time, metrics, shapes; the caller's
    DIRECTORY/STEP/manifest.json        size and SHA-256 of each part's files, written last

A step is a checkpoint exactly if it has a manifest. Arrays are stored under flat names, such as
`layers.attention.q`, so that the files depend on no class of the optimizer's. In a run of several
processes all of them call every function here (`steps` and `tokenizer_directory` apart).
"""

import contextlib
import datetime
import json
import logging
import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from helios_jax import manifest
from helios_jax.config import UserError, require

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_MARKER = 'helios_checkpoints.json'
_METADATA = 'metadata'
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
        self.directory = _absolute(directory)
        self._keep = keep
        self._best_metric = best_metric
        self._saving: int | None = None
        options = ocp.options.AsyncOptions(
            timeout_secs=_COMMIT_SECONDS, post_finalization_callback=self._write_manifest
        )
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=options
        )
        _claim(self.directory)
        self._remove_leftovers()
        _barrier('checkpoints_opened')

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
        arrays = {name: _flatten(tree) for name, tree in items.items()}
        record = {
            **metadata,
            'format_version': FORMAT_VERSION,
            'step': step,
            'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'metrics': metrics or {},
            'arrays': {name: _describe(leaves) for name, leaves in arrays.items()},
        }
        parts = {name: ocp.args.StandardSave(leaves) for name, leaves in arrays.items()}
        parts[_METADATA] = ocp.args.JsonSave(record)
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
        return _committed(self.directory)

    def latest(self) -> int | None:
        """The newest step whose files are intact; None if there is none at all."""
        return resolve(self.directory, 'latest') if self.steps() else None

    def best(self) -> int | None:
        """The intact step of the lowest metric; None if no step has the metric."""
        ranked = _ranked(self.directory, self._best_metric)
        return _first_intact(self.directory, ranked) if ranked else None

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
        _barrier('checkpoint_way_made')

    def _delete_old(self) -> None:
        steps = self.steps()
        kept = {*steps[-self._keep :], *_ranked(self.directory, self._best_metric)[:1]}
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


def tokenizer_directory(directory: epath.PathLike) -> epath.Path:
    """Where the tokenizer's files travel with the checkpoints."""
    return _absolute(directory) / 'tokenizer'


def resolve(directory: epath.PathLike, step: int | str) -> int:
    """The number that `latest`, `best` or a number stands for.

    `latest` and `best` pass over damaged steps, with a warning for each.

    Raises:
      UserError: no such directory, step or intact step.
    """
    directory = _absolute(directory)
    steps = _open(directory)
    require(bool(steps), f'checkpoint directory {directory} holds no complete checkpoint yet.')
    if step == 'latest':
        return _first_intact(directory, steps[::-1])
    if step == 'best':
        ranked = _ranked(directory, 'bits_per_byte')
        require(bool(ranked), f'no step of {directory} has bits_per_byte; ask for latest instead.')
        return _first_intact(directory, ranked)
    require(
        str(step).isdigit() and int(step) in steps,
        f'step={step} is not in {directory}; choose latest, best or one of '
        f'{", ".join(map(str, steps))}.',
    )
    return int(step)


def read_metadata(directory: epath.PathLike, step: int | str = 'latest') -> dict[str, Any]:
    """The JSON saved with a step, with `step`, `time`, `metrics` and `format_version` added.

    Raises:
      UserError: as `resolve`; damaged metadata; a format that is newer than this version's.
    """
    directory = _absolute(directory)
    folder = directory / str(resolve(directory, step))
    metadata = _read_json(folder)
    version = metadata.get('format_version', 0)
    require(
        version <= FORMAT_VERSION,
        f'checkpoint {folder} has format version {version}, newer than the {FORMAT_VERSION} of '
        'this installation; upgrade helios_jax.',
    )
    _check(folder, _METADATA)
    return metadata


def restore(
    directory: epath.PathLike,
    step: int | str,
    item: str,
    abstract: PyTree[jax.ShapeDtypeStruct],
) -> PyTree[jax.Array]:
    """Reads one item, verified, straight onto the devices that `abstract` names.

    Args:
      step: latest, best or a number.
      abstract: the tree to restore; each leaf has a sharding, on whichever mesh.
    Raises:
      UserError: as `read_metadata`; a damaged item; a tree that differs, naming the first array.
    """
    directory = _absolute(directory)
    folder = directory / str(resolve(directory, step))
    saved = read_metadata(directory, int(folder.name))['arrays']
    require(
        item in saved,
        f'checkpoint {folder} has no {item!r}; it holds {", ".join(saved)}.',
    )
    wanted = _flatten(abstract)
    _compare(folder / item, saved[item], _describe(wanted))
    if any(leaf.sharding is None for leaf in wanted.values()):
        raise ValueError(f'every leaf of abstract needs a sharding to restore {item!r}.')
    _check(folder, item)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        arrays = reader.restore(folder / item, args=ocp.args.StandardRestore(wanted))
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def list_steps(directory: epath.PathLike, *, verify: bool = True) -> list[dict[str, Any]]:
    """Each step's `step`, `bytes`, `time` (ISO, UTC), `metrics` and `damage` ('' if intact).

    `damage` reads every byte; without `verify` it is left out.
    """
    directory = _absolute(directory)
    rows = []
    for step in _open(directory):
        folder = directory / str(step)
        metadata = _read_json(folder)
        row = {
            'step': step,
            'bytes': sum(path.stat().length for path in manifest.files(folder).values()),
            'time': metadata.get('time', ''),
            'metrics': metadata.get('metrics', {}),
        }
        rows.append(row | ({'damage': manifest.damage(folder)} if verify else {}))
    return rows


def _absolute(directory: epath.PathLike) -> epath.Path:
    path = epath.Path(directory)
    return path if '://' in str(path) else path.expanduser().resolve()


def _claim(directory: epath.Path) -> None:
    """Marks a directory as ours, unless what it holds would be taken for our steps."""
    marker = directory / _MARKER
    if jax.process_index() == 0 and not marker.exists():
        directory.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in directory.iterdir() if path.name.isdigit())
        require(
            not foreign,
            f'{directory} holds folder {", ".join(foreign[:1])} but is no Helios checkpoint '
            'directory; choose another, nothing there is written over.',
        )
        marker.write_text(json.dumps({'format_version': FORMAT_VERSION}))


def _open(directory: epath.Path) -> list[int]:
    require(directory.exists(), f'checkpoint directory {directory} does not exist.')
    require(
        (directory / _MARKER).exists(),
        f'{directory} is not a checkpoint directory of Helios (it has no {_MARKER}); give the one '
        'that `helios train` wrote.',
    )
    return _committed(directory)


def _committed(directory: epath.Path) -> list[int]:
    names = [path.name for path in directory.iterdir() if path.name.isdigit()]
    return sorted(int(name) for name in names if (directory / name / manifest.NAME).exists())


def _ranked(directory: epath.Path, metric: str) -> list[int]:
    """The steps that have the metric, lowest first; of equal ones the newest first."""
    scores = {}
    for step in _committed(directory):
        score = _read_json(directory / str(step)).get('metrics', {}).get(metric, math.nan)
        if math.isfinite(score):
            scores[step] = score
    return sorted(scores, key=lambda step: (scores[step], -step))


def _first_intact(directory: epath.Path, steps: list[int]) -> int:
    for step in steps:
        damage = manifest.damage(directory / str(step))
        if not damage:
            return step
        log.warning('CHECKPOINT %s IS DAMAGED: %s. Trying another.', directory / str(step), damage)
    raise UserError(f'every checkpoint in {directory} is damaged; see the warnings above.')


def _read_json(folder: epath.Path) -> dict[str, Any]:
    """A step's metadata, {} if it cannot be read: listing must not stop at a damaged step."""
    try:
        return json.loads((folder / _METADATA / 'metadata').read_text())
    except (OSError, ValueError):
        return {}


def _check(folder: epath.Path, part: str) -> None:
    damage = manifest.damage(folder, part)
    require(
        not damage,
        f'checkpoint {folder} is damaged: {damage}; restore another step (see `helios ckpt ls`).',
    )


def _flatten(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), 'two leaves share a name'
    return flat


def _describe(leaves: dict[str, Any]) -> dict[str, str]:
    """Each array's dtype and shape, such as `float32[3, 5]`."""
    return {name: f'{np.dtype(leaf.dtype)}{list(leaf.shape)}' for name, leaf in leaves.items()}


def _compare(path: epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted({*saved, *wanted}):
        ours, theirs = wanted.get(name, 'nothing'), saved.get(name, 'nothing')
        require(
            ours == theirs,
            f'{path} does not fit: {name} is {theirs} in the checkpoint and {ours} in this '
            'configuration; use the configuration that it was trained with.',
        )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
