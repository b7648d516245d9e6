"""Shards of array_record files that together are a TFDS data set, written once, read at random.

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
from tensorflow_datasets.proto import tf_example_pb2

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
    with _local_part(path) as part:
        writer = array_record_module.ArrayRecordWriter(part, 'group_size:1')
        for example in examples:
            record = _serialize(example)
            writer.write(record)
            written['num_examples'] += 1
            written['num_bytes'] += len(record)
        writer.close()
        yield written


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file, complete or not at all."""
    part = _part(path)
    part.write_text(text)
    part.replace(path)


def split_info(
    directory: epath.Path, name: str, split: str, shards: list[dict[str, int]]
) -> tfds.core.SplitInfo:
    """TFDS's description of the shards that `shard_name` names."""
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


def shard_name(name: str, split: str, index: int) -> str:
    return f'{name}-{split}.array_record-{index:05d}'


class Records:
    """The examples of one split of a prepared TFDS data set, at random, from any thread."""

    def __init__(self, info: tfds.core.DatasetInfo, split: str):
        assert info.features is not None
        self._features = info.features
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
        # read([i]) costs O(records in the shard), read(i, i + 1) does not.
        (record,) = _reader(self._paths[shard]).read(position, position + 1)
        return self._features.deserialize_example_np(record)

    def shard(self, index: int, chunk: int = 1024) -> Iterator[dict[str, Any]]:
        """The examples of one shard in order, `chunk` of them read at a time."""
        reader, length = _reader(self._paths[index]), self.shard_lengths[index]
        for start in range(0, length, chunk):
            for record in reader.read(start, min(start + chunk, length)):
                yield self._features.deserialize_example_np(record)


def _serialize(example: Stored) -> bytes:
    record = tf_example_pb2.Example()
    for name, value in example.items():
        feature = record.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.append(value)
    return record.SerializeToString()


def _part(path: epath.Path) -> epath.Path:
    """A name beside `path` that no other process writes."""
    return path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')


def _is_local(path: epath.Path) -> bool:
    return '://' not in os.fspath(path)


@contextlib.contextmanager
def _local_part(path: epath.Path) -> Iterator[str]:
    """A local file name; what is written there becomes `path` on leaving without an error."""
    part = _part(path)
    if _is_local(path):
        local = part
    else:
        local = epath.Path(tempfile.gettempdir()) / part.name
    try:
        yield os.fspath(local)
        if local != part:
            local.copy(part)
        part.replace(path)
    finally:
        local.unlink(missing_ok=True)


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _reader(path: str) -> array_record_module.ArrayRecordReader:
    return array_record_module.ArrayRecordReader(
        _local_copy(epath.Path(path)), 'readahead_buffer_size:0,max_parallelism:0'
    )


def _local_copy(path: epath.Path) -> str:
    """The file itself, or a copy of the bucket's that stays for this machine's later runs."""
    if _is_local(path):
        return os.fspath(path)
    mirror = epath.Path(tempfile.gettempdir()) / 'helios' / digest(os.fspath(path))
    with _copying:
        if not mirror.exists():
            mirror.parent.mkdir(parents=True, exist_ok=True)
            part = _part(mirror)
            path.copy(part)
            part.replace(mirror)
    return os.fspath(mirror)
