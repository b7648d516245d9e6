"""Writes and reads array_record shards of a TFDS data set: written once, read at random.

array_record opens local files only: a shard for a bucket is written here and copied there, and one
from a bucket is copied here before it is read.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from helios_jax import paths
from helios_jax.errors import UserError

OPEN_SHARDS = 512  # below the usual limit of 1024 open files

Stored = Mapping[str, bytes | int]  # an example as it is stored: arrays as their bytes
_copying = threading.Lock()


def digest(*values: Any) -> str:
    """16 hex digits that depend on `values` (anything JSON can hold) and on nothing else."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def shard(path: epath.Path, examples: Iterable[Stored]) -> Iterator[dict[str, int]]:
    """Writes one shard, which gets its name `path` on leaving the context without an error.

    Text, `Tensor(encoding='bytes')` and integer scalars can be stored: TFDS's own serializer,
    made for all features, takes ten times as long.

    Yields:
      `num_examples` and `num_bytes`, as TFDS counts them.
    """
    written = {'num_examples': 0, 'num_bytes': 0}
    with _local_temporary(path) as temporary:
        try:
            writer = array_record_module.ArrayRecordWriter(temporary, 'group_size:1')
            for example in examples:
                record = _serialize(example)
                writer.write(record)
                written['num_examples'] += 1
                written['num_bytes'] += len(record)
            writer.close()
        except RuntimeError as error:  # array_record's, such as for a full disk
            raise unwritable(path, str(error)) from None
        yield written
    _reader.cache_clear()  # what was open under this name has been replaced


@contextlib.contextmanager
def writing(directory: epath.Path) -> Iterator[None]:
    """Turns errors of writing a cache into one that names the file and the fix.

    Raises:
      UserError: any OSError, such as a full disk or a read-only file system.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or directory
        raise unwritable(path, error.strerror or str(error)) from None


def unwritable(path: epath.PathLike, reason: str) -> UserError:
    reason = reason.partition(';')[0].partition('\n')[0].rstrip('.')
    return UserError(
        f'{os.fspath(path)} could not be written: {reason}; make room there, or name another '
        'directory as data.cache_dir.'
    )


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file, complete or not at all."""
    temporary = _temporary(path)
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def damaged(path: epath.Path, cause: str, remedy: str = '') -> UserError:
    remedy = remedy or (
        f'run helios data prepare --rebuild with the same config, or remove {path.parent}, and it '
        'is made anew'
    )
    return UserError(f'{os.fspath(path)} is damaged ({cause}); {remedy}.')


def shard_name(name: str, split: str, index: int) -> str:
    return f'{name}-{split}.array_record-{index:05d}'


class Records:
    """Reads examples of one split of a prepared TFDS data set, at random, from any thread.

    Args:
      remedy: the fix for a damaged file, for messages; by default, making the data set anew.
    Raises:
      UserError: on reading, a file that is missing or damaged.
    """

    def __init__(self, info: tfds.core.DatasetInfo, split: str, remedy: str = ''):
        assert info.features is not None
        self._features = info.features
        self._remedy = remedy
        self._paths = [os.fspath(path) for path in info.splits[split].filepaths]
        self.shard_lengths = list(info.splits[split].shard_lengths)
        self._starts = [0, *itertools.accumulate(self.shard_lengths)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f'record {index} of {len(self)}')
        shard = bisect.bisect_right(self._starts, index) - 1
        position = index - self._starts[shard]
        (example,) = self._read(shard, position, position + 1)
        return example

    def shard(self, index: int, chunk: int = 1024) -> Iterator[dict[str, Any]]:
        """Yields the examples of one shard in order, `chunk` of them read at a time."""
        length = self.shard_lengths[index]
        for start in range(0, length, chunk):
            yield from self._read(index, start, min(start + chunk, length))

    def _read(self, shard: int, start: int, stop: int) -> list[dict[str, Any]]:
        path = self._paths[shard]
        try:
            # read([i]) costs O(records in the shard), read(i, i + 1) does not.
            found = _reader(path).read(start, stop)
            if not all(found):  # what array_record reads of an open file that was emptied
                raise IndexError
            return [self._features.deserialize_example_np(record) for record in found]
        except (IndexError, RuntimeError, OSError, ValueError, message.DecodeError) as error:
            if isinstance(error, IndexError):  # an unreadable file seems to hold nothing
                cause = 'missing' if not epath.Path(path).exists() else 'cut short'
            else:
                cause = str(error).partition(';')[0].partition('\n')[0]
            raise damaged(epath.Path(path), cause, self._remedy) from None


def _serialize(example: Stored) -> bytes:
    record = tf_example_pb2.Example()
    for name, value in example.items():
        feature = record.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.append(value)
    return record.SerializeToString()


def _temporary(path: epath.Path) -> epath.Path:
    """A name beside `path` that no other process writes."""
    return path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')


@contextlib.contextmanager
def _local_temporary(path: epath.Path) -> Iterator[str]:
    """Yields a local file name; that file becomes `path` on leaving without an error."""
    temporary = _temporary(path)
    if paths.is_local(path):
        local = temporary
    else:
        local = epath.Path(tempfile.gettempdir()) / temporary.name
    try:
        yield os.fspath(local)
        if local != temporary:
            local.copy(temporary)
        temporary.replace(path)
    finally:
        local.unlink(missing_ok=True)


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _reader(path: str) -> array_record_module.ArrayRecordReader:
    return array_record_module.ArrayRecordReader(
        _local_copy(epath.Path(path)), 'readahead_buffer_size:0,max_parallelism:0'
    )


def _local_copy(path: epath.Path) -> str:
    """Path of the file, or of a local copy of the bucket's, which stays for later runs here."""
    if paths.is_local(path):
        return os.fspath(path)
    (identity,) = paths.identities([path])
    mirror = epath.Path(tempfile.gettempdir()) / 'helios' / digest(identity)
    with _copying:
        if not mirror.exists():
            mirror.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(mirror)
            path.copy(temporary)
            temporary.replace(mirror)
    return os.fspath(mirror)
