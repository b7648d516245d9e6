"""Reads and writes checkpoints on a host alone, of which one array at a time is in memory."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from helios_jax.checkpoint import layout, manifest, read, write
from helios_jax.errors import require


class StoredItem:
    """Arrays of one item of a checkpoint, each read when it is asked for.

    Attributes:
      arrays: shape and dtype of each array, by its name.
    Raises:
      UserError: the step has no such item.
      DamageError: a file of the item is not what was written.
    """

    def __init__(self, opened: read.Opened, item: str) -> None:
        saved = opened.metadata['arrays']
        require(item in saved, f'checkpoint {opened.folder} has no {item!r}.')
        if damage := opened.damage(item):
            raise read.DamageError(read.refusal(opened.folder, damage))
        self.arrays = {n: layout.parse_description(text) for n, text in saved[item].items()}
        self._opened, self._item = opened, item

    def read(self, name: str) -> np.ndarray:
        """Reads an array into the host's memory.

        Raises:
          DamageError: it cannot be read, or is not what the metadata says.
        """
        import orbax.checkpoint as ocp

        wanted = ocp.args.PyTreeRestore(
            {name: 0},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        folder = self._opened.folder
        try:
            array = ocp.PyTreeCheckpointHandler().restore(folder / self._item, args=wanted)[name]
            described = array.shape, array.dtype
        except Exception as error:
            cause = f'{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}'
            damage = f'{self._item}/{name} cannot be read ({cause})'
            raise read.DamageError(read.refusal(folder, damage)) from error
        if described != self.arrays[name]:
            damage = f'{self._item}/{name} is {array.dtype}{list(array.shape)}, as it should not be'
            raise read.DamageError(read.refusal(folder, damage))
        return array


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def write_step(
    directory: epath.PathLike,
    step: int,
    items: dict[str, dict[str, LazyArray]],
    metadata: dict[str, Any],
) -> None:
    """Writes a step into a directory that has no steps, each array as soon as it is made.

    The manifest comes last: until then the step counts as none.

    Args:
      items: arrays by name, of each item.
      metadata: as of `Checkpoints.save`.
    """
    directory = layout.absolute(directory)
    layout.claim(directory)
    folder = layout.folder(directory, step)
    for item, leaves in items.items():
        (folder / item).mkdir(parents=True)
        handler = _handler()
        handler.save(folder / item, args=write.save_arguments(leaves))
        handler.finalize(folder / item)
    (folder / layout.METADATA).mkdir()
    record = write.record(step, items, metadata, metrics={})
    (folder / layout.METADATA / 'metadata').write_text(json.dumps(record))
    manifest.write(folder)


def _handler() -> Any:
    import orbax.checkpoint as ocp

    class OneByOne(ocp.type_handlers.NumpyHandler):
        """Writes an array before it makes the next."""

        async def serialize(self, values, infos, args=None):
            for value, info, arg in zip(values, infos, args, strict=True):
                for written in await super().serialize([value.make()], [info], [arg]):
                    written.result()
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, OneByOne(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # or Orbax warns that there is none
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
