"""A study's command, whatever it and its like started, and who writes which of its runs."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from folders import entries

ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
}


class Place:
    """Where one study is made; in each place the command is the same.

    Args:
      root: has the study, mine.py.
      runs: names of all its runs.
    """

    def __init__(self, root: Path, name: str, runs: Sequence[str]):
        self.root, self.folder, self.study = root, root / name, root / name / 'w'
        self.runs = runs
        self.folder.mkdir()
        self.mark = f'HELIOS_SOAK={self.folder}'

    def start(self) -> subprocess.Popen:
        command = [sys.executable, '-m', 'helios_jax', 'ablate', f'--study={self.root}/mine.py']
        environment = os.environ | ENVIRONMENT | dict([self.mark.split('=', 1)])
        with (self.folder / 'output').open('ab') as output:
            return subprocess.Popen(
                [*command, '--workdir=w', '--workers=2'],
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )

    def output(self) -> str:
        return (self.folder / 'output').read_text()

    def alive(self) -> set[int]:
        """Processes that a command of this study started, or that these did."""
        found = set()
        for process in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (process / 'environ').read_bytes().split(b'\0'):
                    found.add(int(process.name))
        return found

    def end(self) -> None:
        """Kills all of them."""
        while left := self.alive():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def steps(self) -> int:
        """How many steps the runs have logged by now, those that were lost with them too."""
        return sum(log.read_bytes().count(b'  loss ') for log in self.study.glob('*/*.log'))

    def done(self) -> list[str]:
        """The runs whose result is there."""
        return [run for run in self.runs if (self.study / run / 'report.md').exists()]

    def held_by(self, folder: Path) -> int:
        """The living process that says in the folder's lock that it writes there; 0 for none."""
        with contextlib.suppress(OSError, ValueError):
            pid = json.loads((folder / 'writer.lock').read_text())['pid']
            return pid if pid in self.alive() else 0
        return 0

    def at_rest(self) -> dict[str, dict]:
        """Finished runs that nobody writes any more: all files with their times and contents."""
        rest = [run for run in self.done() if not self.held_by(self.study / run)]
        return {run: entries(self.study / run) | self.log(run) for run in rest}

    def log(self, run: str) -> dict[str, tuple[int, bytes]]:
        log = (self.study / run).with_suffix('.log')
        return {str(log): (log.stat().st_mtime_ns, log.read_bytes())}


class Watch(threading.Thread):
    """Looks who writes which run."""

    def __init__(self, place: Place):
        super().__init__()
        self.place, self.over = place, threading.Event()
        self.most_writers = self.most_runs = 0
        self.writers: dict[str, set[int]] = collections.defaultdict(set)

    def __enter__(self) -> 'Watch':
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.wait(0.05):
            now: dict[str, set[int]] = collections.defaultdict(set)
            for pid in self.place.alive():
                with contextlib.suppress(OSError):
                    for file in Path(f'/proc/{pid}/fd').iterdir():
                        path = Path(os.readlink(file))  # or the one that it replaces it by
                        if file.lstat().st_mode & 0o200 and 'metrics.jsonl' in path.name:
                            now[str(path.parent)].add(pid)
            self.most_runs = max(self.most_runs, len(now))
            for run, pids in now.items():
                self.most_writers = max(self.most_writers, len(pids))
                self.writers[run] |= pids


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def wait_for_none(alive: Callable[[], set[int]]) -> None:
    deadline = time.monotonic() + 60
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = [Path(f'/proc/{pid}/cmdline').read_bytes() for pid in alive()]
    assert not lines, lines
