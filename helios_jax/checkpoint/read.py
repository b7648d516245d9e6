"""Reads checkpoints: which steps there are, their metadata, and their arrays onto any mesh."""

import concurrent.futures
import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from helios_jax.checkpoint import layout, manifest
from helios_jax.checkpoint.manifest import DamageError
from helios_jax.errors import UserError, require
from helios_jax.parallel import agreement

log = logging.getLogger(__name__)

BEST_METRIC = 'bits_per_byte'


@dataclasses.dataclass(frozen=True)
class Opened:
    """One step, its metadata verified; an item's files are hashed when it is first asked for.

    In a run of several processes all of them call every method; process 0 hashes.

    Attributes:
      metadata: what was given to `save`, and `step`, `time`, `metrics`, `arrays`, `format_version`.
    """

    directory: epath.Path
    step: int
    metadata: dict[str, Any]
    files: manifest.Files = dataclasses.field(repr=False)
    _intact: set[str] = dataclasses.field(default_factory=set, repr=False)

    @property
    def folder(self) -> epath.Path:
        return layout.folder(self.directory, self.step)

    @property
    def items(self) -> tuple[str, ...]:
        return tuple(self.metadata['arrays'])

    @property
    def folders(self) -> list[str]:
        """Names of the folders in the manifest: the items', and that of the metadata."""
        return sorted({name.split('/')[0] for name in self.files})

    def damage(self, *items: str) -> str:
        """Describes what is wrong with the files of some items; '' if nothing is."""
        found = self.fault(items) if jax.process_index() == 0 else ''
        return agreement.from_first(found)

    def tokenizer_damage(self) -> str:
        """Names the tokenizer's file that the step was not saved with; '' if there is none."""
        hashes = self.metadata.get('tokenizer_files', {})  # format 1 has none
        folder = layout.tokenizer_directory(self.directory)
        for name, digest in hashes.items() if isinstance(hashes, dict) else ():
            path = folder / str(name)
            if path.name != name or not path.is_file() or manifest.sha256(path) != digest:
                return (
                    f'tokenizer file {path} is not the one that checkpoint {self.folder} was saved '
                    'with; put that one back'
                )
        return ''

    def require_fit(self, item: str, abstract: PyTree[jax.ShapeDtypeStruct]) -> None:
        """Refuses a tree that the item cannot be restored to, reading none of its arrays.

        Raises:
          UserError: no such item; an array that differs, with both shapes.
        """
        saved, wanted = self.metadata['arrays'], layout.describe(layout.flatten(abstract))
        require(
            item in saved,
            f'checkpoint {self.folder} has no {item!r}; it holds {", ".join(saved)}.',
        )
        for name in sorted({*saved[item], *wanted}):
            ours, theirs = wanted.get(name, 'nothing'), saved[item].get(name, 'nothing')
            widened = theirs.replace('bfloat16', 'float32')  # which loses nothing
            require(
                ours in (theirs, widened),
                f'{self.folder / item} does not fit: {name} is {theirs} in the checkpoint and '
                f'{ours} in this configuration; use the configuration that it was trained with.',
            )

    def restore(self, item: str, abstract: PyTree[jax.ShapeDtypeStruct]) -> PyTree[jax.Array]:
        """Reads one item, verified, straight onto the devices that `abstract` names.

        Args:
          abstract: the tree to restore; each leaf has a sharding, on whichever mesh. One that was
            saved in bfloat16 may be float32 there, and is widened while it is read.
        Raises:
          UserError: as `require_fit`.
          DamageError: a damaged item, or one that cannot be read.
        """
        self.require_fit(item, abstract)
        wanted = layout.flatten(abstract)
        if any(leaf.sharding is None for leaf in wanted.values()):
            raise ValueError(f'every leaf of abstract needs a sharding to restore {item!r}.')
        by_us = [item] if jax.process_index() == 0 else []
        if damage := agreement.from_first(self.fault(by_us, hashed=False)):
            raise DamageError(refusal(self.folder, damage))
        arrays: dict[str, jax.Array] = {}
        failure: Exception | None = None
        # Hashed while it is read: neither holds Python's lock, and each takes about as long.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(self.fault, by_us)
            try:
                arrays = _read(self.folder / item, wanted)
            except Exception as error:
                failure = error
            damage = agreement.from_first(hashing.result())
        if failure and not damage:
            cause = f'{type(failure).__name__}: {str(failure).partition(chr(10))[0][:160]}'
            damage = f'{item} cannot be restored ({cause})'
        if damage:
            raise DamageError(refusal(self.folder, damage)) from failure
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])

    def fault(self, items: Iterable[str], *, hashed: bool = True) -> str:
        """Describes what is wrong with some items, for one process alone (else: `damage`)."""
        for item in items:
            if item in self._intact:
                continue
            if damage := manifest.fault(self.folder, self.files, item, hashed=hashed):
                if not layout.is_committed(self.directory, self.step):
                    return f'{self.folder} was deleted while it was read'
                return damage
            if hashed:
                self._intact.add(item)
        return ''


def open_step(
    directory: epath.PathLike, step: int | str = 'latest', items: Sequence[str] = ()
) -> Opened:
    """Opens one step: reads and verifies its manifest and its metadata.

    `latest` and `best` pass over steps that are damaged there or in one of `items`, with a warning
    for each; items that a step does not have are not looked for.

    Args:
      step: latest, best (lowest bits per byte) or a number.
    Raises:
      UserError: no such directory, step or intact step; damage; a format newer than this version's.
    """
    directory = layout.absolute(directory)
    found: Opened | None = None
    with agreement.together():
        if jax.process_index() == 0:
            found = _find(directory, step, items)
    number, metadata = agreement.from_first(found and [found.step, found.metadata])
    return found or Opened(directory, number, metadata, {})


def ranked(directory: epath.Path, *, warn: bool = False) -> list[int]:
    """Lists the steps that have `BEST_METRIC`, lowest first; of equal ones the newest first.

    Args:
      warn: whether to name the steps whose metadata is damaged.
    """
    scores = {}
    for step in layout.committed(directory):
        try:
            score = open_number(directory, step).metadata['metrics'].get(BEST_METRIC, math.nan)
        except DamageError as error:
            if warn:
                _warn_of_damage(directory, step, str(error))
            continue
        if math.isfinite(score):
            scores[step] = score
    return sorted(scores, key=lambda step: (scores[step], -step))


def damage_of(directory: epath.Path, step: int) -> str:
    """Describes what is wrong with a step, hashing all of its files; '' if nothing is."""
    try:
        opened = open_number(directory, step)
    except DamageError as error:
        return str(error)
    return opened.fault(opened.items)


def _read(folder: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp  # half a second, for who reads arrays alone

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.StandardRestore(wanted))


def _find(directory: epath.Path, step: int | str, items: Sequence[str]) -> Opened:
    layout.require_directory(directory)
    steps = layout.committed(directory)
    layout.warn_of_incomplete(directory)
    require(bool(steps), f'checkpoint directory {directory} holds no complete checkpoint yet.')
    if step in ('latest', 'best'):
        chosen = steps[::-1] if step == 'latest' else ranked(directory, warn=True)
        require(bool(chosen), f'no step of {directory} has {BEST_METRIC}; ask for latest instead.')
        for each in chosen:
            if opened := _intact(directory, each, items):
                return opened
        # A run that writes meanwhile may have let go what was listed.
        require(
            not all(layout.is_committed(directory, each) for each in chosen),
            f'every checkpoint in {directory} is damaged; see the warnings above.',
        )
        return _find(directory, step, items)
    require(
        layout.is_step(str(step)) and int(step) in steps,
        f'step={step} is not in {directory}; choose latest, best or one of '
        f'{", ".join(map(str, steps))}.',
    )
    try:
        return open_number(directory, int(step))
    except DamageError as error:
        raise UserError(refusal(layout.folder(directory, int(step)), str(error))) from None


def _intact(directory: epath.Path, step: int, items: Sequence[str]) -> Opened | None:
    try:
        opened = open_number(directory, step)
        damage = opened.fault(item for item in items if item in opened.items)
        if not damage:
            return opened
    except DamageError as error:
        damage = str(error)
    _warn_of_damage(directory, step, damage)
    return None


def _warn_of_damage(directory: epath.Path, step: int, damage: str) -> None:
    if layout.is_committed(directory, step):  # else a run has let it go meanwhile
        folder = layout.folder(directory, step)
        log.warning('CHECKPOINT %s IS DAMAGED: %s. Trying another.', folder, damage)


def open_number(directory: epath.Path, step: int) -> Opened:
    """Raises DamageError where the manifest or the metadata is not what was written."""
    folder = layout.folder(directory, step)
    try:
        files = manifest.read(folder)
    except OSError as error:
        raise DamageError(f'{manifest.NAME} cannot be read ({error.strerror or error})') from None
    if damage := manifest.fault(folder, files, layout.METADATA):
        raise DamageError(damage)
    try:
        metadata = json.loads((folder / layout.METADATA / 'metadata').read_bytes())
    except (OSError, ValueError, RecursionError):
        raise DamageError('its metadata cannot be read') from None
    version = metadata.get('format_version') if isinstance(metadata, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamageError('its metadata has no format_version')
    require(
        version <= layout.FORMAT_VERSION,
        f'checkpoint {folder} has format version {version}, newer than this installation, which '
        f'reads up to {layout.FORMAT_VERSION}; upgrade helios_jax.',
    )
    _check(metadata, step, files)
    return Opened(directory, step, metadata, files)


def _check(metadata: dict[str, Any], step: int, files: manifest.Files) -> None:
    if type(metadata.get('step')) is not int:
        raise DamageError('its metadata has no step')
    if metadata['step'] != step:
        raise DamageError(f'it is step {metadata["step"]} by its metadata; rename it back')
    arrays, metrics = metadata.get('arrays'), metadata.get('metrics')
    shapes = isinstance(arrays, dict) and all(
        isinstance(names, dict) and all(isinstance(shape, str) for shape in names.values())
        for names in arrays.values()
    )
    numbers = isinstance(metrics, dict) and all(map(_is_number, metrics.values()))
    for name, right in (
        ('arrays', shapes),
        ('metrics', numbers),
        ('time', isinstance(metadata.get('time'), str)),
    ):
        if not right:
            raise DamageError(f'its metadata has no {name} that can be read')
    folders = {name.split('/')[0] for name in files}
    if missing := sorted({*metadata['arrays']} - folders):
        raise DamageError(f'{missing[0]} is not in its manifest')


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and value.bit_length() < 1024)


def refusal(folder: epath.Path, damage: str) -> str:
    return f'checkpoint {folder} is damaged: {damage}; restore another step (see `helios ckpt ls`).'
