"""Runs a study: trainings as processes, several at a time, each resumable by itself.

`start` makes them processes of this machine, `ray_tasks.start` tasks on a Ray cluster.
A run that is done is not run again, and an unfinished one goes on where it stopped. Where the study
asks for longer rows, another process of the same worker scores each run once it is trained.
"""

import contextlib
import fcntl
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

from etils import epath

from helios_jax import display, paths, process
from helios_jax.ablate.variants import (
    Variant,
    command,
    failure_file,
    finished,
    held,
    is_open,
    log_file,
    scored,
    told,
)
from helios_jax.parallel import cluster

POLL_SECONDS = 0.1
MEMORY_FRACTION = 0.9  # of a GPU's memory, for the workers that share it


def start(
    base: str,
    environments: Sequence[Mapping[str, str]],
    worker: int,
    variant: Variant,
    log: BinaryIO,
) -> subprocess.Popen[bytes]:
    """Starts a training, or the scoring of a trained run.

    Args:
      base: the config that the study's are variants of.
      environments: of each worker's processes.
      log: file for what the process writes.

    It has a session of its own: Ctrl-C on a terminal reaches the study alone, which passes it on.
    """
    with contextlib.suppress(BlockingIOError):  # a child of an earlier process may still write
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and the process with it: `held`
    return subprocess.Popen(
        [sys.executable, '-m', 'helios_jax', *command(variant, base)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environments[worker],
        start_new_session=True,
    )


def environments(environment: Mapping[str, str], workers: int) -> list[dict[str, str]]:
    """Returns the environment of each worker's processes.

    Of the GPUs that CUDA_VISIBLE_DEVICES names each worker has its share; where there are fewer
    GPUs than workers, workers share their memory.
    """
    # A notebook asks for colours, which a log has no use for.
    environment = {name: value for name, value in environment.items() if name != 'FORCE_COLOR'}
    devices = [name for name in environment.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
    if workers > 1 and len(devices) >= workers:
        shares = [','.join(devices[worker::workers]) for worker in range(workers)]
        return [{**environment, 'CUDA_VISIBLE_DEVICES': share} for share in shares]
    fraction = {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{MEMORY_FRACTION / workers:.3f}'}
    return [{**(fraction if workers > 1 else {}), **environment}] * workers


class Budget:
    """Time that a study may take, by what its longest run has taken.

    Args:
      minutes: from now on; 0 is without end.
      workers: runs at a time.
    """

    def __init__(self, minutes: float, workers: int) -> None:
        self._minutes, self._workers = minutes, workers
        self._start = time.monotonic()
        self.longest = 0.0  # seconds of a run, start and end included

    def allows(self, runs: int) -> bool:
        """True if so many runs more will end in time; nobody knows before the first has ended."""
        elapsed = time.monotonic() - self._start
        needed = math.ceil(runs / self._workers) * self.longest
        return not self._minutes or not self.longest or elapsed + needed <= 60 * self._minutes


class Process(Protocol):
    """Interface of a run's process, wherever it lies; as `subprocess.Popen` has it."""

    returncode: Any  # None while it runs

    def poll(self) -> int | None:
        """Returns the exit code; None while it runs."""

    def terminate(self) -> None:
        """Asks the run to save and stop."""

    def kill(self) -> None:
        """Ends it at once."""


Starter = Callable[[int, Variant, BinaryIO], Process]


class Running:
    """A run's process and its log.

    Args:
      begin: when the worker took the run up; now, unless that was for its training before.
    """

    def __init__(self, worker: int, variant: Variant, starter: Starter, begin: float = 0.0) -> None:
        variant.directory.parent.mkdir(parents=True, exist_ok=True)
        self.worker, self.variant = worker, variant
        self.trains = not finished(variant)
        self._log = log_file(variant)
        self._logged = self._log.stat().st_size if self._log.exists() else 0
        self.begin = begin or time.monotonic()
        display.say(f'{variant.label}: {"training" if self.trains else "scoring"}, {self._log}')
        with self._log.open('ab') as file:
            self.process = starter(worker, variant, file)

    def end(self, stopped: bool) -> float:
        """Records why the process failed, if it did; returns the seconds that it took.

        A run that somebody stopped goes on another time, and so does one that another process was
        writing.
        """
        code = self.process.returncode
        ended = code in (0, 130, -signal.SIGINT, -signal.SIGTERM)
        done = finished if self.trains else scored
        # Who held it may end in between: `done` comes last.
        if not (stopped or ended or held(self.variant) or done(self.variant)):
            content = self._log.read_bytes()[self._logged :].decode(errors='replace')
            written = [line.strip() for line in content.splitlines() if line.strip()]
            ours = [line for line in written if line.startswith('helios: ')]
            reason = ([process.ending(code), *written[-1:], *ours[-1:]])[-1]
            line = ' '.join(reason.removeprefix('helios: ').split())
            paths.write_whole(epath.Path(failure_file(self.variant)), f'{line}\n'.encode())
        return time.monotonic() - self.begin


def run_groups(
    groups: Sequence[Sequence[Variant]],
    starter: Starter,
    *,
    workers: int,
    budget: Budget,
    stop: cluster.StopRequest,
) -> list[Sequence[Variant]]:
    """Runs what is neither done nor failed, `workers` at a time, each group whole or not at all.

    Runs that a killed study left behind are waited for: until they end the workers' devices are
    theirs.

    Args:
      starter: starts the process of a run, whose output goes to the file, for a worker (from 0).
      stop: once it has a signal, nothing is started any more, and what runs is told to save.
    Returns:
      The groups that the budget left out.
    """
    later = [group for group in groups if any(map(is_open, group))]
    total = sum(is_open(variant) for group in later for variant in group)
    dropped: list[Sequence[Variant]] = []
    waiting: list[Variant] = []
    running: list[Running] = []
    ended, stopped = 0, False
    left = [variant for group in later for variant in group if held(variant)]
    for variant in left:
        display.say(f'{variant.label}: waiting for its process, which was there before')
    try:
        while waiting or later or running:
            if stop.signal and not stopped:
                stopped, waiting, later = True, [], []
                for run in running:
                    run.process.terminate()
            if later and not waiting:
                if budget.allows(len(running) + sum(map(is_open, later[0]))):
                    waiting = list(later.pop(0))
                else:
                    dropped, later = later, []
            waiting = [variant for variant in waiting if is_open(variant)]
            left = [variant for variant in left if held(variant)]
            for worker, variant in [] if left else due(waiting, running, workers):
                waiting.remove(variant)
                running.append(Running(worker, variant, starter))
            time.sleep(POLL_SECONDS)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                budget.longest = max(budget.longest, run.end(stopped))
                if run.trains and finished(run.variant) and is_open(run.variant) and not stopped:
                    running.append(Running(run.worker, run.variant, starter, run.begin))
                    continue
                if is_open(run.variant) and held(run.variant) and not stopped:
                    # A run left behind was first.
                    waiting.append(run.variant)
                    left.append(run.variant)
                    continue
                ended += 1
                display.say(f'{run.variant.label}: {told(run.variant)} ({ended} of {total})')
    finally:
        for run in running:  # Ctrl-C once more: what was saved is whole
            run.process.kill()
    return dropped


def due(
    waiting: Sequence[Variant], running: Sequence[Running], workers: int
) -> list[tuple[int, Variant]]:
    """Pairs workers that have nothing to do with runs that no other process writes."""
    busy = {run.worker for run in running}
    idle = [worker for worker in range(workers) if worker not in busy]
    # Who held it may end in between: `is_open` comes last.
    free = [variant for variant in waiting if idle and not held(variant) and is_open(variant)]
    return list(zip(idle, free, strict=False))
