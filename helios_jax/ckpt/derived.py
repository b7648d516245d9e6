"""Makes new checkpoints of old ones, an array at a time: their mean, or a bfloat16 copy.

The new one holds parameters and the routers' balance biases, its tokenizer, and the metadata of the
newest step that it is made of, without held-out figures, which are not its own. `made_from` in its
metadata says what it was made of.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from helios_jax import checkpoint, restoring
from helios_jax.ckpt import places
from helios_jax.errors import require
from helios_jax.train import resume

Arrays = dict[str, checkpoint.LazyArray]


def average(directory: epath.Path, steps: Sequence[int], to: str, *, weights: str) -> None:
    """Writes the mean of several steps' parameters as a new checkpoint, in float32.

    Sums are float64, in the order of the steps, and each mean is rounded once. Balance biases are
    averaged as well.

    Args:
      steps: at least one.
      to: the new workdir.
      weights: those to average: trained, ema or auto, as of `restoring.restore`.
    Raises:
      UserError: a step that is damaged, has other settings than the newest or arrays of other
        shapes, or has no such weights; a place that is taken.
    """
    opened = [checkpoint.open_step(directory, step) for step in sorted({*steps})]
    require_alike(opened)
    items = {restoring.weights_item(each, weights) for each in opened}
    require(
        len(items) == 1,
        f'only some of the steps {listed(opened)} have an ema; choose weights=trained.',
    )
    newest, params = opened[-1], items.pop()
    made_from = {'command': 'average', 'steps': [each.step for each in opened], 'item': params}
    with places.new_directory(to, directory) as new:

        def means(item: str) -> Arrays:
            sources = [checkpoint.StoredItem(each, item) for each in opened]
            return lazy(sources[-1], lambda name: mean(sources, name), np.dtype(np.float32))

        write(new, newest, params, means, means, made_from)


def export(opened: checkpoint.Opened, to: str, *, weights: str) -> str:
    """Writes the parameters of one step in bfloat16, without the optimizer, as a new checkpoint.

    Each is rounded to nearest, ties to even. Balance biases stay float32.

    Args:
      to: the new workdir.
      weights: trained, ema or auto, as of `restoring.restore`.
    Returns:
      The item that was read: params or ema.
    Raises:
      UserError: damage, no such weights, or a place that is taken.
    """
    params = restoring.weights_item(opened, weights)
    bfloat16 = np.dtype('bfloat16')
    made_from = {'command': 'export', 'steps': [opened.step], 'item': params}
    with places.new_directory(to, opened.directory) as new:

        def rounded(item: str) -> Arrays:
            source = checkpoint.StoredItem(opened, item)
            return lazy(source, lambda name: source.read(name).astype(bfloat16), bfloat16)

        def copied(item: str) -> Arrays:
            source = checkpoint.StoredItem(opened, item)
            return lazy(source, source.read)

        write(new, opened, params, rounded, copied, made_from)
    return params


def mean(sources: Sequence[checkpoint.StoredItem], name: str) -> np.ndarray:
    """Returns the mean of an array over several steps, float32, of which one is read at a time."""
    first, *others = sources
    total = first.read(name).astype(np.float64)
    for source in others:
        total += source.read(name).astype(np.float32, copy=False)
    return (total / len(sources)).astype(np.float32)


def lazy(
    source: checkpoint.StoredItem, make: Callable[[str], np.ndarray], dtype: np.dtype | None = None
) -> Arrays:
    """Returns an item whose arrays `make` will make by their names; dtypes are kept by default."""

    def one(name: str, shape: tuple[int, ...], kept: np.dtype) -> checkpoint.LazyArray:
        return checkpoint.LazyArray(shape, dtype or kept, lambda: [((), make(name))])

    return {name: one(name, *described) for name, described in source.arrays.items()}


def write(
    new: epath.Path,
    source: checkpoint.Opened,
    params: str,
    make_params: Callable[[str], Arrays],
    make_router: Callable[[str], Arrays],
    made_from: dict[str, Any],
) -> None:
    """Writes parameters and balance biases, and the tokenizer, into a new checkpoint directory.

    Args:
      params: the item that the parameters come from.
    """
    own = save_tokenizer(source, new) | {'made_from': made_from}
    items = {'params': make_params(params)}
    if 'router' in source.items:
        items['router'] = make_router('router')
    of_the_step = ('format_version', 'step', 'time', 'metrics', 'arrays')
    metadata = {n: value for n, value in source.metadata.items() if n not in of_the_step}
    checkpoint.write_step(new, source.step, items, metadata | own)


def save_tokenizer(source: checkpoint.Opened, new: epath.Path) -> dict[str, Any]:
    """Copies the tokenizer of a step and the files beside it, such as a chat template, verified.

    Returns:
      What metadata says of them.
    """
    tokenizer = restoring.load_tokenizer(source)
    folder = checkpoint.tokenizer_directory(new)
    folder.mkdir(parents=True)
    spec = tokenizer.save(folder)
    held = checkpoint.tokenizer_directory(source.directory)
    for name in source.metadata.get('tokenizer_files', {}):
        (folder / name).write_bytes((held / name).read_bytes())
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    return {'tokenizer': spec, 'tokenizer_files': hashes}


def require_alike(opened: Sequence[checkpoint.Opened]) -> None:
    """Refuses steps that are not of one run: another setting, shape or tokenizer.

    Raises:
      UserError: names the step and what differs.
    """
    newest = opened[-1]
    expected = resume.fixed_settings(restoring.saved_config(newest))
    for each in opened:
        settings = resume.fixed_settings(restoring.saved_config(each))
        different = [name for name, value in settings.items() if expected[name] != value]
        require(
            not different,
            f'{", ".join(different[:3])} of step {each.step} differs from that of step '
            f'{newest.step} in {newest.directory}; average steps of one run.',
        )
        for what in ('arrays', 'tokenizer', 'tokenizer_files'):
            require(
                each.metadata.get(what) == newest.metadata.get(what),
                f'{what} of step {each.step} differ from those of step {newest.step} in '
                f'{newest.directory}; average steps of one run.',
            )


def listed(opened: Sequence[checkpoint.Opened]) -> str:
    return ', '.join(str(each.step) for each in opened)
