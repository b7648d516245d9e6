"""Locks a workdir on an object store: an object names the writer, kept alive by a heartbeat.

The object is made under the precondition that there is none (`ifGenerationMatch=0` on gs://), so of
two writers one wins. Its writer rewrites it every BEAT_SECONDS. A lock that does not change for
DEAD_SECONDS, watched by the clock of whoever wants it (hosts' clocks may differ), is a dead
writer's. It is deleted under the precondition that it is still the generation that was watched,
where the file system has generations (gs://), and otherwise after a last look. A writer that could
not renew its lock for as long, because it was suspended or cut off, must take it for lost: `check`
says so.
"""

import json
import logging
import threading
import time
import uuid
from typing import Any

import fsspec

from helios_jax.errors import UserError

log = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
DEAD_SECONDS = 90.0


class HeldError(Exception):
    """Another writer holds the lock and is alive."""

    def __init__(self, writer: dict[str, Any]) -> None:
        super().__init__(writer)
        self.writer = writer


class RemoteLock:
    """One object, which this process tries to own.

    Args:
      path: path of the object, as `file_system` names it.
      writer: description of this process, for those who find the lock.
    """

    def __init__(
        self, file_system: fsspec.AbstractFileSystem, path: str, writer: dict[str, Any]
    ) -> None:
        self._file_system = file_system
        self._path = path
        self._writer = writer | {'token': uuid.uuid4().hex, 'beat': 0}
        self._ended = threading.Event()
        self._renewed = 0.0
        self._lost = ''
        self._thread = threading.Thread(target=self._renew_until_ended, daemon=True)

    def acquire(self) -> None:
        """Makes the object, or takes it over after having watched it for DEAD_SECONDS.

        Raises:
          HeldError: its writer is alive.
        """
        while not self._create():
            seen, generation = self._read(), self._generation()
            if seen is None:
                continue
            if seen.get('token') == self._writer['token']:
                break  # made by an attempt whose answer was lost
            if self._is_unchanged_until_dead(seen):
                log.warning('Taking over %s, whose writer is gone: %s.', self._path, seen)
                self._delete(seen, generation)
        self._renewed = time.monotonic()
        self._thread.start()

    def begin(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises UserError if another writer may own the lock by now."""
        silent = time.monotonic() - self._renewed
        if not self._lost and silent > DEAD_SECONDS:
            self._lost = f'it could not be renewed for {silent:.0f} s'
        if self._lost:
            raise UserError(
                f'{self._path} was lost ({self._lost}); stopped, so that two runs do not write '
                'into one workdir. Start again to go on from the last checkpoint.'
            )

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.check()
            if (self._read() or {}).get('token') == self._writer['token']:
                self._file_system.rm_file(self._path)
        except (OSError, UserError) as error:
            log.warning('%s was not released: %s', self._path, error)

    def _create(self) -> bool:
        try:
            self._file_system.pipe_file(self._path, self._content(), mode='create')
        except FileExistsError:
            return False
        return True

    def _is_unchanged_until_dead(self, seen: dict[str, Any]) -> bool:
        """Watches the lock; False if it vanished."""
        log.info(
            '%s is held; watching for %.0f s whether its writer lives.', self._path, DEAD_SECONDS
        )
        deadline = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(BEAT_SECONDS / 3, DEAD_SECONDS / 3))
            now = self._read()
            if now is None:
                return False
            if now != seen:
                raise HeldError(now)
        return True

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                found = self._read()
                if (found or {}).get('token') != self._writer['token']:
                    self._lost = f'it is now {found}' if found else 'it was deleted'
                    return
                self._writer['beat'] += 1
                self._file_system.pipe_file(self._path, self._content())
                self._renewed = time.monotonic()
            except (
                Exception
            ) as error:  # of whichever object store; `check` tells when it is too long
                log.warning('%s could not be renewed: %s', self._path, error)

    def _content(self) -> bytes:
        return json.dumps(self._writer).encode()

    def _read(self) -> dict[str, Any] | None:
        """Reads the lock's content: {} if it is no JSON object, None if there is no lock."""
        try:
            content = json.loads(self._file_system.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _generation(self) -> str:
        """Version of the object on gs://; '' elsewhere."""
        if not hasattr(self._file_system, 'call'):
            return ''
        self._file_system.invalidate_cache()
        try:
            return str(self._file_system.info(self._path).get('generation', ''))
        except FileNotFoundError:
            return ''

    def _delete(self, seen: dict[str, Any], generation: str) -> None:
        """Deletes a dead writer's lock, unless somebody else was first."""
        try:
            if generation:
                bucket, key, _ = self._file_system.split_path(self._path)
                self._file_system.call(
                    'DELETE', 'b/{}/o/{}', bucket, key, ifGenerationMatch=generation
                )
            elif self._read() == seen:
                self._file_system.rm_file(self._path)
        except (FileNotFoundError, FileExistsError):
            pass
