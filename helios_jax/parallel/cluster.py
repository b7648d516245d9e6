"""Several processes as one run: start-up, agreement on when to stop, compiled programs kept."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from helios_jax.chips import host_memory
from helios_jax.errors import UserError

log = logging.getLogger(__name__)

START_SECONDS = 300
HOST_SHARE = 0.9  # share of a machine's memory for arrays offloaded from its GPUs


def start() -> None:
    """Joins the processes of a run, where there are several; call before anything else uses JAX.

    On TPU hosts JAX finds its peers by itself. Elsewhere JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID name them; without them the run is a single process.

    Raises:
      UserError: the peers did not all answer in time, or a variable is missing.
    """
    # By default XLA's GPU client caps pinned host memory at 64 GB.
    limit = int(HOST_SHARE * host_memory() / 2**30)
    os.environ.setdefault('XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB', str(limit))
    address = os.environ.get('JAX_COORDINATOR_ADDRESS', '')
    on_tpu_host = any(Path('/dev').glob('accel*')) or Path('/dev/vfio/0').exists()
    wants_cpu = os.environ.get('JAX_PLATFORMS', '').startswith('cpu')
    if not address and (wants_cpu or not on_tpu_host):
        return
    if address and wants_cpu:
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    numbers: dict[str, Any] = {}
    if address:
        for argument, variable in (
            ('num_processes', 'JAX_NUM_PROCESSES'),
            ('process_id', 'JAX_PROCESS_ID'),
        ):
            value = os.environ.get(variable, '')
            if not value.isdigit():
                raise UserError(
                    f'{variable}={value!r} must be a number when JAX_COORDINATOR_ADDRESS is set.'
                )
            numbers[argument] = int(value)
    try:
        jax.distributed.initialize(initialization_timeout=START_SECONDS, **numbers)
    except Exception as error:
        raise UserError(
            f'the processes of this run did not all join within {START_SECONDS} s '
            f'({str(error).splitlines()[0]}); check JAX_COORDINATOR_ADDRESS={address!r} and that '
            'every host started.'
        ) from error
    if jax.process_index():
        logging.getLogger('helios_jax').setLevel(logging.WARNING)  # the first one tells the rest


def enable_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory`, so that none is compiled twice; '' does nothing."""
    if directory:
        path = str(epath.Path(directory).expanduser())
        jax.config.update('jax_compilation_cache_dir', path)
        # The small ones too: dozens of them start a program, and each takes a tenth of a second.
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def wake() -> None:
    """Readies the devices in a thread: a GPU takes two seconds before it holds its first array."""

    def first_array() -> None:
        with contextlib.suppress(Exception):  # who comes next is told
            jax.device_put(0)

    threading.Thread(target=first_array).start()


class StopRequest:
    """Flag that SIGTERM or SIGINT sets; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        log.warning('%s: finishing this step, saving, then stopping.', signal.Signals(number).name)

    def agreed(self) -> bool:
        """True if any process was told to stop; collective, with the same answer everywhere."""
        if jax.process_count() == 1:
            return self.signal != 0
        return bool(multihost_utils.process_allgather(np.array(self.signal != 0)).any())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    request = StopRequest()
    previous = {n: signal.signal(n, request) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
