"""Checks that paths can be opened, and finds out if files have changed without reading them."""

import importlib.util
import os
import posixpath
import time
from collections.abc import Sequence
from typing import Any

import fsspec
from etils import epath

from helios_jax.errors import UserError, require

# Clocks of file systems advance in steps of up to 10 ms (a kernel's tick).
TICK_NANOSECONDS = 50_000_000
SETTLING_TRIES = 40
# What a bucket's listing has of an object; its generation changes with every write.
OBJECT_FIELDS = ('size', 'generation', 'etag', 'md5Hash', 'crc32c')


def is_local(path: epath.PathLike) -> bool:
    return '://' not in os.fspath(path)


def check(name: str, path: str) -> None:
    """Refuses a path that nothing here can open, before anything is tried.

    Args:
      name: the setting or flag that holds it, for the message.
    Raises:
      UserError: another scheme than gs://, or gs:// without the package that reads it.
    """
    scheme, separator, _ = path.partition('://')
    if not separator:
        return
    require(
        scheme == 'gs',
        f'{name}={path!r}: {scheme}:// is not supported; name a local path or gs://BUCKET/PATH.',
    )
    require(
        importlib.util.find_spec('gcsfs') is not None,
        f"{name}={path!r} needs the package gcsfs: pip install 'helios_jax[gcs]'.",
    )


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file, and the directories above it, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f'{path.name}.tmp'
    temporary.write_bytes(content)
    temporary.replace(path)


def identities(files: Sequence[epath.Path]) -> list[list[Any]]:
    """Returns values of each file that change whenever its content does, without reading it.

    A local file has its absolute path, inode, size, and times of modification and of change in
    nanoseconds. The time of change (ctime) is the reliable one: the kernel sets it at every write,
    rename and change of times, and no program can set it back, as `touch -r`, `cp -p` and
    `rsync -t` do with the time of modification. A second change within one tick of that clock
    would go unseen, so that files that have just changed are waited for. An object in a bucket has
    its generation, etag and checksums.

    Raises:
      UserError: a file that never stops changing.
    """
    for _ in range(SETTLING_TRIES):
        now = time.time_ns()
        found = [_identity(file) for file in files]
        # Times in the future are another machine's; waiting for them would not help.
        recent = [
            file
            for file, identity in zip(files, found, strict=True)
            if is_local(file) and abs(now - identity[-1]) < TICK_NANOSECONDS
        ]
        if not recent:
            return found
        time.sleep(TICK_NANOSECONDS / 1e9)
    raise UserError(f'{recent[0]} is being written all the time; wait until it is whole.')


def _identity(file: epath.Path) -> list[Any]:
    if is_local(file):
        stat = os.stat(file)
        return [
            os.path.abspath(file), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        ]  # fmt: skip
    filesystem, path = fsspec.core.url_to_fs(os.fspath(file))
    info = filesystem.info(path)
    return [os.fspath(file), *(str(info.get(name)) for name in OBJECT_FIELDS)]


def sizes(directory: epath.Path) -> dict[str, int]:
    """Returns the bytes of each file in a directory, by name, from one listing."""
    filesystem, path = fsspec.core.url_to_fs(os.fspath(directory))
    return {
        posixpath.basename(entry['name']): entry['size']
        for entry in filesystem.ls(path, detail=True, refresh=True)
        if entry['type'] == 'file'
    }
