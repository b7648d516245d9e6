"""Reads and writes checkpoints on a host alone, an array or a part of one at a time in memory."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
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
    """An array whose parts are made when they are written.

    Attributes:
      parts: gives the parts in turn, each with its indices along the first axes: `((), array)` is
        a whole array, and `((2, 5), x)` what stands at [2, 5]. A view is copied a chunk at a time.
      num_indices: how many indices each part has.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]
    num_indices: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def write_step(
    directory: epath.PathLike,
    step: int,
    items: dict[str, dict[str, LazyArray]],
    metadata: dict[str, Any],
) -> None:
    """Writes a step into a directory that has no steps, each part of an array once it is made.

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
        # A chunk that two parts share would be read and written again.
        cut = {name: tuple(range(leaf.num_indices)) for name, leaf in leaves.items()}
        handler.save(folder / item, args=write.save_arguments(leaves, cut))
        handler.finalize(folder / item)
    (folder / layout.METADATA).mkdir()
    record = write.record(step, items, metadata, metrics={})
    (folder / layout.METADATA / 'metadata').write_text(json.dumps(record))
    manifest.write(folder, meanwhile=lambda: _sync(folder))


def _sync(folder: epath.Path) -> None:
    """Waits until the disk has every file, of which the manifest is to tell."""
    if manifest.is_remote(folder):
        return
    for path in manifest.files(folder).values():
        with path.open('rb') as file:
            os.fsync(file.fileno())


def _handler() -> Any:
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class OneByOne(ocp.type_handlers.NumpyHandler):
        """Writes an array before it begins the next, and a part while it makes the next one."""

        async def serialize(self, values, infos, args=None):
            for each in zip(values, infos, args, strict=True):
                for written in await super().serialize(*([one] for one in each)):
                    written.result()
            return []

        async def _open_and_write(self, value, tspec, ts_context):
            tspec = tspec | {'context': {'file_io_sync': False}}  # `_sync` waits once for all
            opened = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            writing = None
            for index, part in value.parts():
                if writing:
                    await writing
                writing = opened[index].write(part, can_reference_source_data_indefinitely=True)
            if writing:
                await writing

    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, OneByOne(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # or Orbax warns that there is none
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
