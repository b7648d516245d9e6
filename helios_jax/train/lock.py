"""One writer: process 0 of a run holds its workdir's lock from before data is prepared to the end.

Local disks: `writer.lock` in the workdir, locked by the operating system (flock) and so released
whenever the process ends, SIGKILL included. It holds one JSON line while a run lives and is empty
afterwards; no run deletes it, since a lock on a deleted file guards nothing. Across hosts this
needs a file system on which flock reaches all of them: NFS 4, NFS 3 with its lock daemon (mounted
without `nolock` and `local_lock`), Lustre mounted with `flock`, GPFS, CephFS. A mounted bucket
(gcsfuse) locks within one host: give gs:// instead. A file system without flock is refused.

Object stores: see `remote_lock`.

A command that is refused before `begin` leaves things as it found them: the lock's content and time
of change, and no lock and no workdir where there was none. Readers take no lock.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import filelock
import fsspec
import jax
from etils import epath

from helios_jax.errors import UserError
from helios_jax.parallel import agreement
from helios_jax.train import remote_lock

log = logging.getLogger(__name__)

NAME = 'writer.lock'
READ_SECONDS = 1.0  # time for a writer that has just locked to say who it is


@runtime_checkable
class Lock(Protocol):
    """Interface of the lock that a run holds."""

    def begin(self) -> None:
        """Declares that the workdir is about to be changed."""

    def check(self) -> None:
        """Raises UserError where another run may have taken the lock over."""


class OthersLock:
    """The lock in every process but the first: nothing to hold."""

    def begin(self) -> None:
        pass

    def check(self) -> None:
        pass


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Lock]:
    """Holds the lock of a workdir, which is made if it is absent; every process calls this.

    Raises:
      UserError: another run writes there, with its host, process and start; the file system has no
        locks.
    """
    with contextlib.ExitStack() as stack:
        held: Lock = OthersLock()
        with agreement.together():
            if jax.process_index() == 0:
                remote = '://' in str(workdir)
                held = stack.enter_context((_remote if remote else _local)(workdir))
        yield held


def identity() -> dict[str, Any]:
    """Describes this process for whoever finds its lock."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    return {'host': socket.gethostname(), 'pid': os.getpid(), 'since': now}


def describe(writer: dict[str, Any]) -> str:
    host, pid, since = (writer.get(name, 'unknown') for name in ('host', 'pid', 'since'))
    return f'process {pid} on host {host}, since {since}'


class LocalLock(OthersLock):
    def __init__(self, path: epath.Path, *, is_new: bool) -> None:
        self._path = path
        self._changed = False
        self._found: bytes | None = None
        self._times = (0, 0)
        if not is_new:
            stat = os.stat(path)
            self._found, self._times = path.read_bytes(), (stat.st_atime_ns, stat.st_mtime_ns)

    def begin(self) -> None:
        self._changed = True

    def write(self, writer: dict[str, Any]) -> None:
        if self._found:
            log.warning(
                'Taking over %s from %s, which ended without releasing it.',
                self._path,
                describe(_parse(self._found)),
            )
        self._path.write_text(json.dumps(writer))

    def leave(self) -> None:
        """Leaves an empty file after a run, and the file as it was after a refused command."""
        if self._changed:
            self._path.write_text('')
        elif self._found is None:
            self._path.unlink(missing_ok=True)
        else:
            self._path.write_bytes(self._found)
            os.utime(self._path, ns=self._times)


@contextlib.contextmanager
def _local(workdir: epath.Path) -> Iterator[Lock]:
    absent = [path for path in (workdir, *workdir.parents) if not path.exists()]
    path = workdir / NAME
    is_new = not path.exists()
    system_lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            system_lock.acquire()
        except filelock.Timeout:
            raise UserError(_refusal(workdir, _writer(path))) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            if is_new:
                path.unlink(missing_ok=True)
            raise UserError(
                f'{workdir} lies on a file system that cannot lock files ({error.strerror}); mount '
                'it with locks (NFS 4, Lustre with -o flock), or choose another workdir.'
            ) from error
        with contextlib.ExitStack() as stack:
            stack.callback(system_lock.release)
            held = LocalLock(path, is_new=is_new)
            stack.callback(held.leave)
            held.write(identity())
            yield held
    finally:
        for folder in absent:  # innermost first; what is not empty stays
            with contextlib.suppress(OSError):
                os.rmdir(folder)


@contextlib.contextmanager
def _remote(workdir: epath.Path) -> Iterator[Lock]:
    file_system, path = fsspec.core.url_to_fs(str(workdir / NAME))
    held = remote_lock.RemoteLock(file_system, path, identity())
    try:
        held.acquire()
    except remote_lock.HeldError as error:
        raise UserError(_refusal(workdir, error.writer)) from None
    try:
        yield held
    finally:
        held.release()


def _refusal(workdir: epath.Path, writer: dict[str, Any]) -> str:
    return (
        f'{workdir} is being written by {describe(writer)}; wait for it, stop it, or choose '
        'another workdir.'
    )


def _writer(path: epath.Path) -> dict[str, Any]:
    deadline = time.monotonic() + READ_SECONDS
    writer: dict[str, Any] = {}
    while not writer and time.monotonic() < deadline:
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            writer = _parse(path.read_bytes())
    return writer


def _parse(content: bytes) -> dict[str, Any]:
    try:
        writer = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return writer if isinstance(writer, dict) else {}
