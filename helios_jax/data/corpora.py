"""Reads the documents of a corpus.

A corpus is `python_stdlib`, a glob of files (JSONL records or whole files, .gz or not), or
`tfds:NAME`; a mixture is 'a=0.7,b=0.3'. Whether a suffix is written in capitals does not matter.
"""

import gzip
import io
import json
import os
import re
import stat
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import fsspec
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import constants, read_only_builder, registered

from helios_jax import paths
from helios_jax.data import chat, records
from helios_jax.errors import UserError, nearest, require

STDLIB = 'python_stdlib'
TFDS_PREFIX = 'tfds:'
# Tests are most of the bytes and missing from many installs; site-packages is not the library.
STDLIB_LEAVES_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}


class Document(NamedTuple):
    prompt: str  # read, never a target; '' for plain text
    text: str
    messages: str = ''  # of a conversation, as JSON; prompt and text are then ''
    place: str = ''  # of a conversation: its file and line, for errors of its template


def parse(spec: str) -> list[tuple[str, Fraction]]:
    """Parses `data.corpus` into corpora and their shares, which add up to 1.

    Raises:
      UserError: a mixture in which a corpus has no weight, or a weight of 0.
    """
    corpora = [corpus.strip() for corpus in spec.split(',')]
    weighted = [re.fullmatch(r'(.+)=(\d+\.?\d*|\.\d+)', corpus) for corpus in corpora]
    if not any(weighted):
        return [(spec, Fraction(1))]
    mixture = []
    for corpus, match in zip(corpora, weighted, strict=True):
        if match is None or Fraction(match[2]) == 0:
            raise UserError(
                f'data.corpus={spec!r}: {corpus!r} needs a weight above 0, such as {corpus}=0.3.'
            )
        mixture.append((match[1], Fraction(match[2])))
    total = sum(weight for _, weight in mixture)
    return [(corpus, weight / total) for corpus, weight in mixture]


def texts(spec: str) -> Iterator[str]:
    """Yields every document of `data.corpus`, corpus by corpus, prompts and turns joined."""
    for corpus, _ in parse(spec):
        for document in read(corpus):
            contents = [m['content'] for m in json.loads(document.messages or '[]')]
            yield document.prompt + document.text + '\n'.join(contents)


def read(corpus: str) -> Iterator[Document]:
    """Yields the documents of one corpus in a fixed order, empty ones left out.

    Raises:
      UserError: nothing there, a file that is not text or no file at all, a malformed record.
    """
    if corpus.startswith(TFDS_PREFIX):
        documents = _read_tfds(corpus)
    else:
        documents = (document for path in _files(corpus) for document in _read_file(corpus, path))
    for document in documents:
        if document.text or document.prompt or document.messages:
            yield document


def state(corpus: str) -> Any:
    """Returns values that change whenever the corpus does, without reading its text.

    `paths.identities` says how changes are found.
    """
    if not corpus.startswith(TFDS_PREFIX):
        return paths.identities(_files(corpus))
    builder = _tfds_builder(corpus)
    info = [file for file in epath.Path(builder.data_dir).iterdir() if file.suffix == '.json']
    shards = map(epath.Path, builder.info.splits['train'].filepaths)
    return [TFDS_PREFIX, paths.identities([*sorted(info), *shards])]


def _files(corpus: str) -> list[epath.Path]:
    """Lists the files of a glob, or of the standard library, sorted."""
    if corpus == STDLIB:
        return _stdlib_files()
    paths.check('data.corpus', corpus)
    path = epath.Path(corpus).expanduser()
    matches = [path] if _is_file(path) else _glob(corpus, path)
    files = sorted(match for match in matches if _is_file(match))
    if not files:
        raise UserError(_no_files(corpus, path))
    return files


def _is_file(path: epath.Path) -> bool:
    """True if the path is a file; False if it is a directory or absent.

    Raises:
      UserError: a pipe, a device or a socket, which may never end, or a link to nothing.
    """
    if not paths.is_local(path):
        return path.is_file()
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if os.path.lexists(path):
            raise UserError(
                f'{path} is a link to nothing ({error}); mend it, or leave it out of data.corpus.'
            ) from None
        return False
    require(
        stat.S_ISREG(mode) or stat.S_ISDIR(mode),
        f'{path} is a pipe, a device or a socket, not a file; leave it out of data.corpus.',
    )
    return stat.S_ISREG(mode)


def _stdlib_files() -> list[epath.Path]:
    files = []
    for folder, folders, names in os.walk(sysconfig.get_paths()['stdlib']):
        folders[:] = [name for name in folders if name not in STDLIB_LEAVES_OUT]
        for name in names:
            # The interpreter's build writes _sysconfigdata*.
            if name.endswith('.py') and not name.startswith('_sysconfigdata'):
                files.append(epath.Path(folder) / name)
    return sorted(files)


def _glob(corpus: str, pattern: epath.Path) -> list[epath.Path]:
    """Lists the paths that match, local or in a bucket; epath itself refuses `**`."""
    scheme, separator, _ = os.fspath(pattern).rpartition('://')
    try:
        filesystem, path = fsspec.core.url_to_fs(os.fspath(pattern))
        return [epath.Path(scheme + separator + match) for match in filesystem.glob(path)]
    except Exception as error:  # a malformed pattern; a bucket that cannot be reached
        raise UserError(
            f'data.corpus={corpus!r} cannot be listed: {str(error) or repr(error)}'
        ) from None


def _no_files(corpus: str, path: epath.Path) -> str:
    if path.is_dir():
        return f'data.corpus={corpus!r} is a directory; name its files, such as {path}/**/*.txt.'
    return (
        f'data.corpus={corpus!r} matches no file; it must be {STDLIB}, a glob of files or '
        f'tfds:NAME.{nearest(corpus, [STDLIB])}'
    )


def _read_file(corpus: str, path: epath.Path) -> Iterator[Document]:
    name = path.name.lower()
    try:
        with path.open('rb') as raw:
            file = gzip.GzipFile(fileobj=raw) if name.endswith('.gz') else raw
            if name.removesuffix('.gz').endswith('.jsonl'):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _record(line, f'{path}:{number}')
            else:
                yield Document('', _decode(file.read(), path, stdlib=corpus == STDLIB))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f'{path} is not a whole gzip file: {error}; compress it again, or leave it out of '
            'data.corpus.'
        ) from None
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}.') from None


def _decode(content: bytes, path: epath.Path, *, stdlib: bool) -> str:
    encoding = 'utf-8'
    if stdlib:  # sources may declare another one
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    try:
        text = content.decode(encoding)
        offset = content.find(b'\0')
    except UnicodeDecodeError as error:
        offset = error.start
    if offset >= 0:
        raise UserError(
            f'{path} is not UTF-8 text: byte {content[offset]:#04x} at offset {offset}; convert '
            'the file or leave it out of data.corpus.'
        )
    return text


def _record(line: bytes, place: str) -> Document:
    """Reads a JSONL line: {"text": …}, {"prompt": …, "completion": …} or {"messages": […]}."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{place} is not a JSON record: {error}.') from None
    document = _fields(record, place)
    try:
        ''.join(document[:3]).encode()
    except UnicodeEncodeError:
        raise UserError(f'{place} has half a surrogate pair, which is no text.') from None
    return document


def _fields(record: Any, place: str) -> Document:
    for prompt, text in ((None, 'text'), ('prompt', 'completion')):
        fields = [name for name in (prompt, text) if name]
        if isinstance(record, dict) and all(isinstance(record.get(n), str) for n in fields):
            return Document(record[prompt] if prompt else '', record[text])
    if isinstance(record, dict) and 'messages' in record:
        return Document('', '', chat.stored(record, place), place)
    raise UserError(
        f'{place} must have the string "text", the strings "prompt" and "completion", or the list '
        '"messages".'
    )


def _tfds_builder(corpus: str) -> tfds.core.DatasetBuilder:
    """Opens the prepared data set of `tfds:NAME`, or of `tfds:` and a version's directory."""
    name = corpus.removeprefix(TFDS_PREFIX)
    require(bool(name.strip()), f'data.corpus={corpus!r} names no data set; write tfds:NAME.')
    paths.check('data.corpus', name)
    try:
        if (epath.Path(name).expanduser() / 'dataset_info.json').exists():
            builder = tfds.builder_from_directory(epath.Path(name).expanduser())
        else:
            builder = read_only_builder.builder_from_files(name)
        formats = [stored.value for stored in builder.info.available_file_formats()]
    except registered.DatasetNotFoundError:
        raise UserError(
            f'data.corpus={corpus!r}: no prepared data set of this name in '
            f'{constants.DATA_DIR}; prepare it as array_record, or set TFDS_DATA_DIR.'
        ) from None
    except Exception as error:  # TFDS's parsers of names and descriptions raise all sorts
        reason = (str(error) or repr(error)).partition('\n')[0].rstrip('.')
        raise UserError(
            f'data.corpus={corpus!r} cannot be opened as a TFDS data set: {reason}; name one that '
            'is prepared, or the directory of one of its versions.'
        ) from None
    if 'array_record' not in formats:
        raise UserError(
            f'data.corpus={corpus!r} is stored as {", ".join(formats)} in {builder.data_dir}; '
            'prepare it with file_format=array_record.'
        )
    builder = tfds.builder_from_directory(builder.data_dir, file_format='array_record')
    if 'train' not in builder.info.splits:
        raise UserError(
            f"data.corpus={corpus!r} has no split 'train', only {', '.join(builder.info.splits)}."
        )
    return builder


def _read_tfds(corpus: str) -> Iterator[Document]:
    info = _tfds_builder(corpus).info
    named = {
        name: feature
        for name, feature in info.features.items()
        if isinstance(feature, tfds.features.Text)
    }
    if 'text' not in named and len(named) != 1:
        raise UserError(
            f"data.corpus={corpus!r} has no text feature called 'text'; its features are "
            f'{", ".join(info.features)}.'
        )
    feature = 'text' if 'text' in named else next(iter(named))
    source = records.Records(info, 'train', remedy='prepare that data set again')
    for shard in range(len(source.shard_lengths)):
        for number, example in enumerate(source.shard(shard)):
            try:
                yield Document('', example[feature].decode())
            except UnicodeDecodeError as error:
                raise UserError(
                    f'data.corpus={corpus!r}: record {number} of shard {shard} is not UTF-8 text: '
                    f'byte offset {error.start}.'
                ) from None
