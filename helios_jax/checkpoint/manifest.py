"""A folder's manifest: the size and SHA-256 of every file below it, written last, checked later.

Orbax restores arrays with flipped bits silently; this does not. What lies directly in the folder is
left out: Orbax still changes its own files there while it commits. Files are hashed once a process.
"""

import concurrent.futures
import functools
import hashlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

NAME = 'manifest.json'
_intact: set[tuple[str, str, str]] = set()  # folder, text of its manifest, part


def files(folder: epath.Path) -> dict[str, epath.Path]:
    """The files of a folder's subfolders, by their path within it."""
    found, folders = {}, [folder]
    for each in folders:  # which grows: epath has no recursive glob
        for path in each.iterdir():
            if path.is_dir():
                folders.append(path)
            elif each != folder:
                found[str(path.relative_to(folder))] = path
    return found


def write(folder: epath.Path) -> None:
    """Hashes the files and writes the manifest, whole or not at all."""
    found = files(folder)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256, found.values()))
    sizes = [path.stat().length for path in found.values()]
    manifest = dict(zip(found, zip(sizes, hashes, strict=True), strict=True))
    temporary = folder / f'{NAME}.tmp'
    temporary.write_text(json.dumps(manifest, indent=0))
    temporary.replace(folder / NAME)


def damage(folder: epath.Path, part: str = '') -> str:
    """What differs from the manifest, '' if nothing does.

    Of several processes the first reads the files; all of them call this.

    Args:
      part: a subfolder, to check that one alone.
    """
    found = _find(folder, part) if jax.process_index() == 0 else ''
    if jax.process_count() == 1:
        return found
    damaged = multihost_utils.broadcast_one_to_all(np.array(bool(found)))
    return found or ('process 0 found a damaged file' if damaged else '')


def sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _find(folder: epath.Path, part: str) -> str:
    text = (folder / NAME).read_text()
    try:
        manifest = json.loads(text)
    except ValueError:
        return f'{NAME} cannot be read'
    parts: dict[str, list[str]] = {}
    for name in manifest:
        parts.setdefault(name.split('/')[0], []).append(name)
    for each in [part] if part else parts:
        if each not in parts:
            return f'{each} is not in its manifest'
        if (str(folder), text, each) in _intact:
            continue
        with concurrent.futures.ThreadPoolExecutor() as pool:
            faults = pool.map(functools.partial(_fault, folder, manifest), parts[each])
            if fault := next(filter(None, faults), ''):
                return fault
        _intact.add((str(folder), text, each))
    return ''


def _fault(folder: epath.Path, manifest: dict[str, list[Any]], name: str) -> str:
    size, digest = manifest[name]
    path = folder / name
    if not path.exists():
        return f'{name} is missing'
    if path.stat().length != size:
        return f'{name} has {path.stat().length} bytes instead of {size}'
    return '' if sha256(path) == digest else f'{name} has changed since it was written'
