"""Reads checkpoints: which steps there are, their metadata, and their arrays onto any mesh."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from helios_jax.checkpoint import layout, manifest
from helios_jax.errors import require


def resolve(directory: epath.PathLike, step: int | str) -> int:
    """The number that `latest`, `best` or a number stands for.

    `latest` and `best` pass over damaged steps, with a warning for each.

    Raises:
      UserError: no such directory, step or intact step.
    """
    directory = layout.absolute(directory)
    steps = layout.open_steps(directory)
    require(bool(steps), f'checkpoint directory {directory} holds no complete checkpoint yet.')
    if step == 'latest':
        return layout.first_intact(directory, steps[::-1])
    if step == 'best':
        ranked = layout.ranked(directory, 'bits_per_byte')
        require(bool(ranked), f'no step of {directory} has bits_per_byte; ask for latest instead.')
        return layout.first_intact(directory, ranked)
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
    directory = layout.absolute(directory)
    folder = directory / str(resolve(directory, step))
    metadata = layout.read_json(folder)
    version = metadata.get('format_version', 0)
    require(
        version <= layout.FORMAT_VERSION,
        f'checkpoint {folder} has format version {version}, newer than this installation, which '
        f'reads up to {layout.FORMAT_VERSION}; upgrade helios_jax.',
    )
    layout.check(folder, layout.METADATA)
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
    directory = layout.absolute(directory)
    folder = directory / str(resolve(directory, step))
    saved = read_metadata(directory, int(folder.name))['arrays']
    require(
        item in saved,
        f'checkpoint {folder} has no {item!r}; it holds {", ".join(saved)}.',
    )
    wanted = layout.flatten(abstract)
    _compare(folder / item, saved[item], layout.describe(wanted))
    if any(leaf.sharding is None for leaf in wanted.values()):
        raise ValueError(f'every leaf of abstract needs a sharding to restore {item!r}.')
    layout.check(folder, item)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        arrays = reader.restore(folder / item, args=ocp.args.StandardRestore(wanted))
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def list_steps(directory: epath.PathLike, *, verify: bool = True) -> list[dict[str, Any]]:
    """Each step's `step`, `bytes`, `time` (ISO, UTC), `metrics` and `damage` ('' if intact).

    `damage` reads every byte; without `verify` it is left out.
    """
    directory = layout.absolute(directory)
    rows = []
    for step in layout.open_steps(directory):
        folder = directory / str(step)
        metadata = layout.read_json(folder)
        row = {
            'step': step,
            'bytes': sum(path.stat().length for path in manifest.files(folder).values()),
            'time': metadata.get('time', ''),
            'metrics': metadata.get('metrics', {}),
        }
        rows.append(row | ({'damage': manifest.damage(folder)} if verify else {}))
    return rows


def _compare(path: epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted({*saved, *wanted}):
        ours, theirs = wanted.get(name, 'nothing'), saved.get(name, 'nothing')
        require(
            ours == theirs,
            f'{path} does not fit: {name} is {theirs} in the checkpoint and {ours} in this '
            'configuration; use the configuration that it was trained with.',
        )
