"""Marks a data set in the cache as complete, and finds damage to it.

It is complete once dataset_info.json, TFDS's description, is there: it is written last. A manifest
beside it says what each file must be, so that damage is found and named.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from helios_jax import paths
from helios_jax.data import records
from helios_jax.errors import UserError

MANIFEST, INFO = 'manifest.json', 'dataset_info.json'


def complete(
    directory: epath.Path,
    name: str,
    features: tfds.features.FeaturesDict,
    metadata: dict[str, Any],
    splits: Mapping[str, list[dict[str, int]]],
) -> None:
    """Writes TFDS's description of the shards of each split: with it the data set is complete."""
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version('1.0.0'), data_dir=os.fspath(directory),
        module_name=__name__,
    )  # fmt: skip
    info = tfds.core.DatasetInfo(
        builder=identity, features=features, metadata=tfds.core.MetadataDict(metadata)
    )
    info.set_file_format('array_record')
    found = [split_info(directory, name, split, shards) for split, shards in splits.items()]
    info.set_splits(tfds.core.SplitDict(found))
    with tempfile.TemporaryDirectory() as temporary:
        info.write_to_directory(temporary)
        files = {file.name: file.read_text() for file in epath.Path(temporary).iterdir()}
    names = {os.path.basename(path) for split in found for path in split.filepaths}
    sizes = {name: size for name, size in paths.sizes(directory).items() if name in names}
    files[MANIFEST] = json.dumps(
        {'sha256': {name: _sha256(text.encode()) for name, text in files.items()}, 'sizes': sizes}
    )
    for file in sorted(files, key=lambda name: name == INFO):
        records.write_text(directory / file, files[file])


def is_complete(directory: epath.Path) -> bool:
    """True if `complete` has run, whether or not files were damaged since."""
    return (directory / INFO).exists() and (directory / MANIFEST).exists()


def verify(directory: epath.Path) -> None:
    """Compares each file with the manifest: the small ones by content, shards by their size.

    The content of shards is checked when it is read, by array_record's own checksums.

    Raises:
      UserError: a file that is missing or is not as it was written.
    """
    name = MANIFEST
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        found = paths.sizes(directory)
        for name, size in manifest['sizes'].items():
            if found.get(name) != size:
                there = f'{found[name]} bytes' if name in found else 'missing'
                raise records.damaged(directory / name, f'{there}, where {size} bytes were written')
        for name, digits in manifest['sha256'].items():
            if _sha256((directory / name).read_bytes()) != digits:
                raise records.damaged(directory / name, 'not what was written')
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise records.damaged(directory / name, repr(error)) from None


def split_info(
    directory: epath.Path, name: str, split: str, shards: list[dict[str, int]]
) -> tfds.core.SplitInfo:
    """Describes the shards that `shard_name` names, as TFDS does."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, split=split, filetype_suffix='array_record',
        template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
    )  # fmt: skip
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard['num_examples'] for shard in shards],
        num_bytes=sum(shard['num_bytes'] for shard in shards),
        filename_template=template,
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
