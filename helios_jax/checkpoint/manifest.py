"""Manifest of a folder: size and SHA-256 of every file below it, written last, checked later.

Orbax restores arrays with flipped bits silently; this finds them. Files directly in the folder are
left out: Orbax still changes its own files there while it commits, and nothing reads them.

The manifest carries a SHA-256 of its own list, and is damaged unless it is, byte for byte, what
`write` would have written. Manifests of format 1 are the bare list.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from etils import epath

from helios_jax.errors import UserError

NAME = 'manifest.json'
Files = dict[str, tuple[int, str]]  # size in bytes and SHA-256, by the path within the folder


class DamageError(UserError):
    """Files that were read are not what was written; the message tells people what is wrong."""


def is_remote(path: epath.Path) -> bool:
    return '://' in str(path)


def files(folder: epath.Path) -> dict[str, epath.Path]:
    """Lists the files of a folder's subfolders, by their path within it."""
    found, folders = {}, [folder]
    for each in folders:  # which grows: epath has no recursive glob
        for path in each.iterdir():
            if path.is_dir():
                folders.append(path)
            elif each != folder:
                found[str(path.relative_to(folder))] = path
    return found


def write(folder: epath.Path, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Hashes the files and writes the manifest, whole or not at all.

    Args:
      meanwhile: called while files are hashed; it has returned before the manifest is there.
    """
    found = files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hashing = pool.map(sha256, found.values())
        sizing = pool.map(_size, found.values())
        meanwhile()
        hashes, sizes = list(hashing), list(sizing)
    listed = dict(zip(found, map(list, zip(sizes, hashes, strict=True)), strict=True))
    temporary = folder / f'{NAME}.tmp'
    temporary.write_text(_render({'files': listed, 'sha256': _digest(listed)}))
    temporary.replace(folder / NAME)


def read(folder: epath.Path) -> Files:
    """Parses the manifest.

    Raises:
      DamageError: it is not exactly what was written, or names a file outside the folder.
      FileNotFoundError: there is none.
    """
    try:
        text = (folder / NAME).read_bytes().decode()
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise DamageError(f'{NAME} cannot be read') from None
    except IsADirectoryError:
        raise DamageError(f'{NAME} is a directory') from None
    signed = isinstance(content, dict) and content.keys() == {'files', 'sha256'}
    listed = content['files'] if signed else content
    if not isinstance(listed, dict) or not listed:
        raise DamageError(f'{NAME} is no list of files')
    wrong = next((name for name, entry in listed.items() if not _is_entry(name, entry)), None)
    if wrong is not None:
        raise DamageError(f'{NAME} has an entry {wrong[:80]!r} that no checkpoint has')
    if _render(content) != text or (signed and content['sha256'] != _digest(listed)):
        raise DamageError(f'{NAME} has changed since it was written')
    return {name: (size, digest) for name, (size, digest) in listed.items()}


def fault(folder: epath.Path, listed: Files, subfolder: str, *, hashed: bool = True) -> str:
    """Describes what differs from the manifest in one subfolder; '' if nothing does.

    Args:
      hashed: True reads the files; False sees only what is no file of the right size.
    """
    names = [name for name in listed if name.startswith(f'{subfolder}/')]
    if not names:
        return f'{subfolder} is not in its manifest'
    find = functools.partial(_fault, folder, listed, hashed)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(find, names)), '')


def sha256(path: epath.Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open('rb') as file:
        while size := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:size])
    return digest.hexdigest()


def _fault(folder: epath.Path, listed: Files, hashed: bool, name: str) -> str:
    size, digest = listed[name]
    path = folder / name
    if not is_remote(path):
        real, root = pathlib.Path(os.path.realpath(path)), os.path.realpath(folder)
        if not real.is_relative_to(root):
            return f'{name} is a link that leaves the checkpoint'
    if not (path.is_file() if is_remote(path) else os.path.isfile(path)):
        return f'{name} is missing'
    try:
        if (now := _size(path)) != size:
            return f'{name} has {now} bytes instead of {size}'
        same = not hashed or sha256(path) == digest
        return '' if same else f'{name} has changed since it was written'
    except OSError as error:
        return f'{name} cannot be read ({error.strerror or error})'


def _is_entry(name: str, entry: Any) -> bool:
    path = pathlib.PurePosixPath(name)
    inside = not path.is_absolute() and '..' not in path.parts and '\0' not in name
    if not inside or len(path.parts) < 2 or str(path) != name:
        return False
    match entry:
        case [int(size), str(digest)]:
            whole = not isinstance(size, bool) and size >= 0
            return whole and re.fullmatch('[0-9a-f]{64}', digest) is not None
    return False


def _render(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=0)


def _digest(listed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _size(path: epath.Path) -> int:
    # epath's stat also looks up the owner's name, which a container may not have.
    return path.stat().length if is_remote(path) else os.stat(path).st_size
