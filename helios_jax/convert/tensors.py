"""Safetensors files: their headers checked before anything is read, then one tensor at a time.

A tensor is a view of its file, which is mapped: the system can drop its pages.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from helios_jax.convert.names import Counterpart
from helios_jax.convert.values import read_json
from helios_jax.errors import UserError, nearest, require

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
BLOCK = 2**18  # values that a cache holds
THREADS = min(8, os.cpu_count() or 1)  # that read a tensor, each some of its pages
# Tables that old checkpoints carry, which follow from config.json.
IGNORED = re.compile(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq')


class Header(NamedTuple):
    file: str
    shape: tuple[int, ...]
    dtype: str  # as the header names it
    span: slice  # of the file's bytes


class Tensors:
    """All tensors of a directory; nothing but headers is read until `read`."""

    def __init__(self, directory: epath.Path):
        """Reads the headers.

        Raises:
          UserError: an index that names other than files of the directory, a file that is no
            safetensors file or whose sizes do not add up, a tensor elsewhere than the index says.
        """
        self.directory = directory
        self._files: dict[str, np.ndarray] = {}  # the bytes of each, mapped
        self.found = {name: tensor for name, tensor in self._listed() if not _ignored(name)}

    def require_exactly(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses what is missing, what is not known, other shapes and other dtypes.

        Args:
          wanted: name → shape.
        """
        for name, shape in wanted.items():
            if name not in self.found:  # the nearest of many names takes long to find
                raise UserError(
                    f'{self.directory} lacks tensor {name}, which its config.json asks for.'
                    f'{nearest(name, self.found)}'
                )
            got = self.found[name]
            require(
                got.shape == shape,
                f'{self.directory / got.file}: tensor {name} has shape {list(got.shape)}, but '
                f'{list(shape)} by config.json.',
            )
            require(
                got.dtype in DTYPES,
                f'{self.directory / got.file}: tensor {name} is of type {got.dtype}; only '
                f'{", ".join(DTYPES)} can be read.',
            )
        extra = next((name for name in self.found if name not in wanted), '')
        require(
            not extra,
            f'{self.directory} has tensor {extra!r:.120}, which no model of its config.json has.',
        )

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, in the dtype of its file; nobody may write to it.

        Raises:
          UserError: it has NaN or infinity.
        """
        file, shape, dtype, span = self.found[name]
        x = self._files[file][span].view(DTYPES[dtype]).reshape(shape)
        x = x if x.flags.aligned else x.copy()
        require(
            is_finite(x),
            f'{self.directory / file}: tensor {name} has a value that is NaN or infinite.',
        )
        return x

    def _listed(self) -> Iterator[tuple[str, Header]]:
        directory, index = self.directory, self.directory / INDEX
        if not index.exists():
            require(
                (directory / SINGLE).is_file(),
                f'{directory} has neither {SINGLE} nor {INDEX}; other formats of weights are not '
                'read.',
            )
            yield from self._headers(SINGLE)
            return
        places = read_json(index).get('weight_map')
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise UserError(f'{index}: weight_map must map names of tensors to names of files.')
        for file in sorted(set(places.values())):
            require(
                re.fullmatch(r'[\w.-]+\.safetensors', file) is not None,
                f'{index} names file {file!r:.120}; it must be a .safetensors file beside the '
                'index.',
            )
            require((directory / file).is_file(), f'{index} names {file}, which is not there.')
            for name, tensor in self._headers(file):
                place = places.pop(name, 'no file')
                require(
                    _ignored(name) or place == file,
                    f'{directory / file} has tensor {name!r:.120}, which {INDEX} places in '
                    f'{place!r:.120}.',
                )
                yield name, tensor
        left = next(iter(places), '')
        require(
            not left, f'{index} places tensor {left!r:.120} in {places.get(left)}, which lacks it.'
        )

    def _headers(self, file: str) -> Iterator[tuple[str, Header]]:
        content = self._files[file] = _mapped(self.directory / file)
        begin = 8 + int.from_bytes(content[:8].tobytes(), 'little')
        header = json.loads(content[8:begin].tobytes())
        header.pop('__metadata__', None)
        for name, tensor in header.items():
            span = slice(*(begin + offset for offset in tensor['data_offsets']))
            yield name, Header(file, tuple(tensor['shape']), tensor['dtype'], span)


def _ignored(name: str) -> bool:
    return IGNORED.fullmatch(name) is not None


def _mapped(path: epath.Path) -> np.ndarray:
    """Maps a file's bytes, once its header is found to be whole, and its sizes the file's."""
    try:
        safe_open(str(path), 'np')
        return np.asarray(np.memmap(str(path), np.uint8, 'r'))
    except (SafetensorError, OSError) as error:
        raise UserError(f'{path} cannot be read as safetensors ({str(error)[:160]}).') from None


def is_finite(x: np.ndarray) -> bool:
    """True if a tensor has neither NaN nor infinity, which bits tell in a third of the time."""
    bits = x.reshape(-1).view(f'u{x.itemsize}')
    infinity = int(np.array(np.inf, x.dtype).view(bits.dtype)) << 1  # without the sign

    def below(part: np.ndarray) -> bool:
        blocks = (part[i : i + BLOCK] << 1 for i in range(0, part.size, BLOCK))
        return all(int(block.max()) < infinity for block in blocks)

    if bits.size <= BLOCK:
        return below(bits)
    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(below, np.array_split(bits, THREADS)))


def shards(
    pieces: Iterable[Counterpart], bytes_of_value: int, most_bytes: int
) -> list[list[Counterpart]]:
    """Splits tensors into files of at most `most_bytes`, or of one tensor that is larger."""
    files: list[list[Counterpart]] = []
    size = math.inf
    for piece in pieces:
        own = math.prod(piece.shape) * bytes_of_value
        if size + own > most_bytes:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += own
    return files


def write_index(directory: epath.Path, files: Mapping[str, list[Counterpart]], total: int) -> None:
    """Writes the index of several files.

    Args:
      total: bytes of all tensors.
    """
    places = {piece.name: file for file, pieces in files.items() for piece in pieces}
    content = {'metadata': {'total_size': total}, 'weight_map': places}
    (directory / INDEX).write_text(json.dumps(content, indent=1))


def write(path: epath.Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, str(path), metadata={'format': 'pt'})
