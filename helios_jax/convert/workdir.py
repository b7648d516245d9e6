"""Makes an imported model a workdir that `helios generate`, `eval` and `train.init_from` open.

Tensors go from their file to the checkpoint one by one, so that no model is in memory as a whole.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator

import numpy as np
from etils import epath
from jaxtyping import Array

from helios_jax import checkpoint, config
from helios_jax.convert import importing, names
from helios_jax.convert.importing import CheckedDirectory
from helios_jax.convert.names import Counterpart
from helios_jax.errors import require
from helios_jax.train import report
from helios_jax.train.run import CONFIG_FILE

BFLOAT16, FLOAT32 = np.dtype('bfloat16'), np.dtype(np.float32)


def save(source: CheckedDirectory, workdir: epath.PathLike, *, seed: int = 0) -> None:
    """Writes a model as step 0 of a run that has not begun, with its config and its tokenizer.

    Weights that the directory has in bfloat16 are written as they are, all others in float32.

    Args:
      workdir: a directory that does not exist yet; it is whole or not there.
      seed: as `importing.load`.
    Raises:
      UserError: as `importing.load`.
    """
    workdir = checkpoint.absolute(workdir)
    unfinished = workdir.parent / f'{workdir.name}.unfinished'
    require(not workdir.exists(), f'{workdir} exists already; nothing is written over.')
    require(not unfinished.exists(), f'{unfinished} is left from an import; remove it.')
    try:
        _write(source, unfinished, workdir, seed)
        unfinished.rename(workdir)
    except BaseException:
        if unfinished.exists():
            unfinished.rmtree()
        raise


def _write(
    source: CheckedDirectory, unfinished: epath.Path, workdir: epath.Path, seed: int
) -> None:
    importing.check_head(source)
    files = source.files
    folder = checkpoint.tokenizer_directory(unfinished / 'checkpoints')
    folder.mkdir(parents=True)
    for name, content in files.contents.items():
        (folder / name).write_bytes(content)
    own = checkpoint.tokenizer_directory(workdir / 'checkpoints')
    cfg = config.replace(source.config, {'data.tokenizer': str(own / files.spec)})
    (unfinished / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.contents.items()}
    metadata = {
        'config': dataclasses.asdict(cfg),
        'tokenizer': files.spec,
        'tokenizer_files': hashes,
        'samples': 0,
        'environment': report.environment(),
        'origin': importing.origin(source),
    }
    checkpoint.write_step(unfinished / 'checkpoints', 0, lazy_items(source, seed), metadata)


def lazy_items(source: CheckedDirectory, seed: int) -> dict[str, dict[str, checkpoint.LazyArray]]:
    """Lists the items of a checkpoint, whose arrays are read from the directory by and by."""
    shapes = importing.shapes(source)
    fresh = importing.fresh(source, shapes, seed)
    own: dict[str, list[Counterpart]] = {}
    for piece in source.pieces:
        own.setdefault(piece.weight.name, []).append(piece)
    items: dict[str, dict[str, checkpoint.LazyArray]] = {'params': {}}
    for name, abstract in shapes.items():
        shape, pieces = abstract.shape, own.get(name, [])
        if pieces:
            exact = all(
                piece.factor == 1 and source.tensors.found[piece.name].dtype == 'BF16'
                for piece in pieces
            )
            dtype = BFLOAT16 if exact else FLOAT32
            parts = functools.partial(_parts, source, pieces, shape, dtype)
            array = checkpoint.LazyArray(shape, dtype, parts, len(pieces[0].place))
        else:
            whole = functools.partial(_whole, shape, fresh.get(name))
            array = checkpoint.LazyArray(shape, FLOAT32, whole)
        group = 'router' if name.startswith(names.ROUTER) else 'params'
        items.setdefault(group, {})[name.removeprefix(names.ROUTER)] = array
    return items


def _parts(
    source: CheckedDirectory, pieces: list[Counterpart], shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    for piece in pieces:
        wanted = shape[len(piece.place) :]
        # A matrix is turned where its values are copied into the checkpoint's chunks.
        x = piece.to_ours(source.tensors.read(piece.name))
        if x.shape != wanted:
            padded = np.zeros(wanted, x.dtype)
            padded[tuple(map(slice, x.shape))] = x
            x = padded
        yield piece.place, x.astype(dtype, copy=False)


def _whole(
    shape: tuple[int, ...], array: Array | None
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Gives a parameter that was made here, or zeros: balance biases that the directory lacks."""
    yield (), np.zeros(shape, np.float32) if array is None else np.asarray(array)
