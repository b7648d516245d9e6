"""Training speed: tokens a second, and the share of the devices' peak FLOP/s.

Both figures of `helios train` and of `helios bench train` come from here.
"""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from helios_jax import chips, config
from helios_jax.arch import flops
from helios_jax.data.pipeline import Batch

COUNTED = ('tokens', 'mean_context', 'mean_window_context', 'router/drop_fraction')
IN_FLIGHT = 64  # steps that the host may be ahead of the device


def mean_context(model: config.Model, batch: Batch) -> dict[str, Float[Array, '']]:
    """Mean number of tokens that attention sees from a real token, itself included.

    `mean_window_context` is that of layers with a window, where the model has any.
    """
    seen = jnp.where(batch.segment_ids > 0, batch.positions + 1.0, 0)
    num_tokens = jnp.maximum((batch.segment_ids > 0).sum(dtype=jnp.int32), 1)
    means = {'mean_context': seen.sum() / num_tokens}
    if any(kind.endswith('window') for kind in model.kind_counts):
        means['mean_window_context'] = jnp.minimum(seen, model.window).sum() / num_tokens
    return {name: mean.astype(jnp.float32) for name, mean in means.items()}


def peak_flops() -> float:
    """FLOP/s of all devices together, NaN for devices that no table has."""
    return chips.peak_flops(jax.devices()[0].device_kind) * jax.device_count()


class Throughput:
    """Adds up what steps did, without waiting for them.

    Args:
      cfg: resolved.
      peak: FLOP/s of all devices together, NaN where that is not known.
    """

    def __init__(self, cfg: config.Config, peak: float) -> None:
        self._config = cfg
        self._peak = peak
        self._pending: list[dict[str, Array]] = []  # figures that may still be on a device
        self._totals: Any = collections.Counter()  # tokens, and sums over tokens; floats

    def add(self, reported: Mapping[str, Array]) -> None:
        """Counts a step, whose metrics these are."""
        self._pending.append({name: reported[name] for name in COUNTED if name in reported})
        if len(self._pending) >= 2 * IN_FLIGHT:
            self._fetch(IN_FLIGHT)  # steps that have ended

    def figures(self, seconds: float) -> dict[str, float]:
        """Returns the speed over the steps added since the last call, and starts anew.

        Args:
          seconds: time that the steps took, all together.
        Returns:
          `tokens_per_second` (padding left out), `mfu` (every row counted as one document, as the
          convention is) and `segment_mfu` (what attention saw); MFU is NaN where the peak is.
        """
        self._fetch(len(self._pending))
        model, totals = self._config.model, self._totals
        num_tokens = max(totals['tokens'], 1)
        mean = {name: totals[name] / num_tokens for name in COUNTED}
        dropped = flops.dropped_flops(model, mean['router/drop_fraction'])
        row = flops.flops_per_token(model, self._config.data.row_length)
        segments = flops.segment_flops_per_token(
            model, mean['mean_context'], mean['mean_window_context']
        )
        rate = totals['tokens'] / seconds
        totals.clear()
        return {
            'tokens_per_second': rate,
            'mfu': rate * (row - dropped) / self._peak,
            'segment_mfu': rate * (segments - dropped) / self._peak,
        }

    def _fetch(self, count: int) -> None:
        for step in jax.device_get(self._pending[:count]):
            num_tokens = int(step.pop('tokens'))
            self._totals['tokens'] += num_tokens
            for name, value in step.items():
                self._totals[name] += num_tokens * float(value)
        del self._pending[:count]


class Lap(NamedTuple):
    step_seconds: float  # time of all steps together, with their wait for data
    figures: dict[str, float]


class Timer:
    """Measures the wall time of a training loop on this host, by what it was spent on.

    `measure('data_wait')` goes around fetching each step's batch and counts the steps. Steps run
    asynchronously: call `lap` once the last one's metrics are on the host.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: Any = collections.Counter()  # seconds as floats
        self._steps = 0

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start
            self._steps += name == 'data_wait'

    def lap(self) -> Lap:
        """Returns where the time since the last call went, and starts anew.

        A step's time is all that was not measured as something else, with its wait for data.
        """
        now = time.perf_counter()
        total, steps, wait = now - self._start, self._steps, self._seconds['data_wait']
        stepping = total - self._seconds.total() + wait
        figures = {f'{name}_fraction': s / total for name, s in self._seconds.items()}
        figures['step_fraction'] = (stepping - wait) / total
        if steps:
            figures['step_seconds'] = stepping / steps
        self._start, self._steps = now, 0
        self._seconds.clear()
        return Lap(stepping, figures)
