"""Starts the runs of a study as tasks on a Ray cluster; `runs.start` makes them local processes.

A task trains on the node that Ray picks, as a process of its own, and returns the exit code. All
that a study knows of a run lies in its workdir, as ever, and so each node must see the study's:
`cluster` asks them all. Needs the extra `ray`.

Ray's workers on the nodes import this module, which therefore does not load JAX.
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from helios_jax import config
from helios_jax.errors import UserError, require

if TYPE_CHECKING:
    from helios_jax.ablate.runs import Starter
    from helios_jax.ablate.variants import Variant

LOCAL, RUNNING = 'local', 'auto'  # addresses: a cluster of one's own; one that runs on this machine
ANSWER_SECONDS = 60  # time for a node to say what it sees
CONNECT_SECONDS = 5
POLL_SECONDS = 0.1
OBJECT_STORE_BYTES = 2**27  # of a cluster of one's own: tasks pass exit codes


class Share(NamedTuple):
    """Division of a cluster among runs."""

    workers: int  # runs at a time
    cpus: int  # of each run
    gpus: int  # of each run


@contextlib.contextmanager
def cluster(
    address: str, base: str, configs: Sequence[config.Config], workdir: Path, workers: int | None
) -> Iterator[tuple['Starter', int]]:
    """Joins a Ray cluster, or starts one on this machine; leaves or ends it afterwards.

    Args:
      address: `local` for a cluster of one's own, `auto`, or HOST:PORT.
      base: the config that the study's are variants of.
      configs: those of the study's runs.
      workdir: of the study; an absolute path.
      workers: runs at a time; None: as many as the cluster holds.
    Yields:
      A starter for `runs.run_groups`, and the number of runs at a time.
    Raises:
      UserError: Ray is missing; no cluster answers there; no node has the GPUs of a run's mesh; a
        node that does not see what is written where the workdir will be, or whose locks do not
        reach it.
    """
    require(
        importlib.util.find_spec('ray') is not None,
        "--launcher=ray needs Ray: pip install 'helios_jax[ray]'.",
    )
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    import ray

    _join(address)
    try:
        nodes = [node for node in ray.nodes() if node['Alive']]
        share = divided([node['Resources'] for node in nodes], workers, mesh_devices(configs))
        fitting = [node for node in nodes if node['Resources'].get('CPU', 0) >= share.cpus]
        _require_shared(workdir, [n for n in fitting if n['Resources'].get('GPU', 0) >= share.gpus])
        yield functools.partial(start, base, share), share.workers
    finally:
        ray.shutdown()


def start(base: str, share: Share, worker: int, variant: 'Variant', log: BinaryIO) -> 'RayRun':
    """Starts a training, or a scoring, as a task; a `Starter` once `base` and `share` are given."""
    from helios_jax.ablate.variants import command  # which loads JAX

    return submit(share, ['-m', 'helios_jax', *command(variant, base)], os.path.abspath(log.name))


def submit(share: Share, arguments: Sequence[str], log: str) -> 'RayRun':
    """Hands a process to the cluster, as `run_python` takes it.

    Ray runs it once: what a lost node leaves undone is for the same study to go on with.
    """
    import ray

    Path(stop_file(log)).unlink(missing_ok=True)  # of a study that was killed while it stopped
    options = {'num_cpus': share.cpus, 'num_gpus': share.gpus, 'max_retries': 0}
    task = ray.remote(run_python).options(**options)
    return RayRun(task.remote(arguments, log, os.getcwd()), log)


class RayRun:
    """A run on the cluster, with what a study asks of a `subprocess.Popen`."""

    def __init__(self, reference: Any, log: str) -> None:
        self._reference, self._log = reference, log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the training's exit code; None while it waits for its turn or runs."""
        import ray

        if self.returncode is None and ray.wait([self._reference], timeout=0)[0]:
            try:
                self.returncode = ray.get(self._reference)
            except ray.exceptions.TaskCancelledError:
                self.returncode = -signal.SIGKILL
            except ray.exceptions.RayError as error:
                self.returncode = 1
                with open(self._log, 'a') as file:
                    file.write(f'\nhelios: Ray lost the run: {_first_line(error)}\n')
            Path(stop_file(self._log)).unlink(missing_ok=True)
        return self.returncode

    def terminate(self) -> None:
        """Asks the run to save and stop, by a file: `ray.cancel` may pass by a task that starts."""
        Path(stop_file(self._log)).touch()

    def kill(self) -> None:
        import ray

        ray.cancel(self._reference, force=True)


def stop_file(log: str) -> str:
    """Names the file that asks the run of this log to stop."""
    return f'{log}.stop'


def run_python(arguments: Sequence[str], log: str, directory: str) -> int:
    """Runs a Python process on a node, as a task; returns its exit code.

    It gets SIGTERM once there is a `stop_file`, and does not start where there is one already.

    Args:
      log: file that its output is added to.
      directory: that it starts in; the study's, so that a relative path means the same.
    """
    if os.path.exists(stop_file(log)):
        return -signal.SIGTERM
    with open(log, 'ab') as file:
        with contextlib.suppress(BlockingIOError):  # a child of an earlier process may still write
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and the process with it
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=directory,
            start_new_session=True,
        )
    try:
        while process.poll() is None and not os.path.exists(stop_file(log)):
            time.sleep(POLL_SECONDS)
        process.terminate()
        process.wait()
    finally:
        process.kill()
    return process.returncode


def mesh_devices(configs: Sequence[config.Config]) -> int:
    """Returns the most devices that a mesh asks for by number; an axis of -1 takes what is left."""
    sizes = [dataclasses.asdict(cfg.mesh).values() for cfg in configs]
    return max(math.prod(size for size in each if size > 0) for each in sizes)


def divided(nodes: Sequence[Mapping[str, float]], workers: int | None, devices: int) -> Share:
    """Divides a cluster among runs.

    Where there are GPUs a run has as many as its mesh asks for, one by default, and so many runs
    fit. Elsewhere a run has a node for itself, or, with more workers than nodes, its share of the
    CPUs of the smallest.

    Args:
      nodes: the resources of each, by Ray's names.
      workers: runs at a time; None: as many as the cluster holds.
      devices: that a run's mesh asks for.
    Raises:
      UserError: no node has that many GPUs, or a CPU.
    """
    gpus = [int(node.get('GPU', 0)) for node in nodes]
    cpus = [int(node['CPU']) for node in nodes if node.get('CPU', 0) >= 1]
    require(bool(cpus), 'no node of the Ray cluster has CPUs; start one with `ray start`.')
    if any(gpus):
        require(
            max(gpus) >= devices,
            f'the mesh of a run asks for {devices} GPUs, and no node of the Ray cluster has more '
            f'than {max(gpus)}; make the mesh smaller.',
        )
        return Share(workers or sum(count // devices for count in gpus), 1, devices)
    workers = workers or len(cpus)
    return Share(workers, max(1, min(cpus) // math.ceil(workers / len(cpus))), 0)


def sees_lock(path: str, directory: str) -> str:
    """Says what a node lacks to train: '' if it sees the file `path`, locked, and the directory."""
    if not os.path.isdir(directory):
        return f'has no directory {directory}, where the study was started'
    try:
        with open(path, 'rb') as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return ''
    except OSError as error:
        return f'does not see what is written in {os.path.dirname(path)} ({error.strerror})'
    return f'sees {os.path.dirname(path)}, but not its locks'


def _join(address: str) -> None:
    import ray

    refusal = (
        '--ray_address={}: no Ray cluster can be joined there ({}); start one: ray start --head.'
    )
    own = address == LOCAL
    host, _, port = address.rpartition(':')
    try:
        if address not in (LOCAL, RUNNING):  # Ray itself tries for minutes, and then exits
            require(port.isdigit(), f'--ray_address={address} must be local, auto or HOST:PORT.')
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(
            address,
            include_dashboard=False if own else None,
            object_store_memory=OBJECT_STORE_BYTES if own else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(refusal.format(address, _first_line(error))) from error


def _require_shared(workdir: Path, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuses nodes that do not see the workdir, by a file that is locked, and gone afterwards."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    existing = next(path for path in (workdir, *workdir.parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(dir=existing, prefix='.helios_') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for node in nodes:
            where = NodeAffinitySchedulingStrategy(node['NodeID'], soft=False)
            task = ray.remote(sees_lock).options(num_cpus=0, scheduling_strategy=where)
            try:
                lack = ray.get(task.remote(file.name, os.getcwd()), timeout=ANSWER_SECONDS)
            except ray.exceptions.RayError as error:
                lack = f'cannot run this version of helios_jax ({_first_line(error)})'
            name = f'node {node["NodeManagerAddress"]} of the Ray cluster'
            require(
                not lack,
                f'{name} {lack}; take a workdir on a file system that all nodes share, with locks.',
            )


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or of the last that it tells of."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if 'Traceback' in str(error) else [*lines, type(error).__name__][0]
