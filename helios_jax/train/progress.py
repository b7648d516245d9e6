"""Shows the progress of a run, and stops it where a figure is no longer finite."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from helios_jax import config, display
from helios_jax.errors import UserError
from helios_jax.train import throughput
from helios_jax.train.run import Run

log = logging.getLogger(__name__)

GIB = 2**30


class Progress:
    """Turns steps' device metrics and the clock into figures for people.

    Args:
      first: steps that were made before.
    """

    def __init__(self, run: Run, first: int) -> None:
        self.run = run
        self.timer = throughput.Timer()
        self._throughput = throughput.Throughput(run.config, throughput.peak_flops())
        if first < run.config.train.num_steps:
            announce(run, first)

    def count(self, reported: Mapping[str, jax.Array]) -> None:
        """Counts a step, without waiting for it."""
        self._throughput.add(reported)

    def figures(self, step: int, reported: Mapping[str, jax.Array]) -> dict[str, float]:
        """Returns the metrics of a step, and the speed of all steps since the last call.

        Raises:
          UserError: a figure that is no longer finite.
        """
        values = {name: float(value) for name, value in jax.device_get(reported).items()}
        check_finite(self.run, step, values)
        lap = self.timer.lap()
        timed = lap.figures | self._throughput.figures(lap.step_seconds)
        known = {f'time/{name}': value for name, value in timed.items() if not math.isnan(value)}
        return values | known | peak_memory()


def announce(run: Run, first: int) -> None:
    """Prints what will be trained, and on what; warns of a router that will not learn."""
    cfg, device = run.config, jax.devices()[0]
    size = sum(leaf.size for leaf in jax.tree.leaves(run.setup.state.params))
    display.say(
        f'Training {size:,} parameters on {jax.device_count()} × {device.device_kind}: steps '
        f'{first + 1:,} to {cfg.train.num_steps:,}, each of {cfg.train.batch_rows:,} rows of '
        f'{cfg.data.row_length:,} tokens'
    )
    if display.speaks() and (warning := router_warning(cfg.model)):
        log.warning(warning)


def router_warning(model: config.Model) -> str:
    """Text on how a router learns where a token has one expert; '' if it learns as usual."""
    moe = model.moe
    has_router = any(kind.startswith('moe') for kind in model.kind_counts) and moe.num_experts > 1
    if not has_router or moe.num_experts_per_token > 1 or not moe.renormalize:
        return ''
    sources = []
    if moe.balance in ('aux', 'both') and moe.aux_loss:
        sources.append('the balance loss')
    if moe.router_z_loss:
        sources.append('the z-loss')
    verb = 'train' if len(sources) > 1 else 'trains'
    learns = f'only {" and ".join(sources)} {verb} it' if sources else 'nothing trains it'
    return (
        'model.moe.num_experts_per_token=1: the weight of the one chosen expert is renormalised to '
        f'a constant, so that the router gets no gradient from the loss; {learns}. Set '
        'model.moe.num_experts_per_token=2 or more for a router that learns which expert to choose.'
    )


def check_finite(run: Run, step: int, reported: Mapping[str, Any]) -> None:
    """Stops a run whose loss or gradient is no number any more.

    Raises:
      UserError: naming the figure, the step and the checkpoint to go on from.
    """
    # The loss is of the parameters before this step, the gradient's norm tells of those after it.
    figures = {name: float(reported[name]) for name in ('loss', 'gradient_norm')}
    broken = next((name for name, value in figures.items() if not math.isfinite(value)), '')
    if not broken:
        return
    run.checkpoints.wait()
    raise UserError(
        f'the {broken} is {figures[broken]} at step {step}; nothing was saved since step '
        f'{max(run.checkpoints.steps(), default=0)}. Lower optimizer.learning_rate (now '
        f'{run.config.optimizer.learning_rate}) or raise optimizer.warmup_steps, and start again.'
    )


def peak_memory() -> dict[str, float]:
    """Returns `device/peak_gib`, the most that a device of this process has held; {} if unknown."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
    return {'device/peak_gib': max(peaks) / GIB} if peaks else {}


@contextlib.contextmanager
def profiled(run: Run, nth: int) -> Iterator[bool]:
    """Profiles `train.profile_steps` steps from the run's tenth on, into workdir/profile.

    Yields True if the profile ends with this step, the run's nth.
    """
    count = run.config.train.profile_steps
    ends = count > 0 and nth == 9 + count
    if count and nth == 10:
        jax.profiler.start_trace(str(run.workdir / 'profile'))
    yield ends
    if ends:
        jax.profiler.stop_trace()
