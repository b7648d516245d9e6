"""Measures how much of the baseline's tokens, FLOPs or seconds an arm needs to be as good."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from helios_jax.ablate.records import StudyRun
from helios_jax.ablate.statistics import Estimate, estimate

BUDGETS = {'tokens': 'tokens', 'flops': 'FLOPs', 'seconds': 'seconds'}  # field → unit


class SpeedUp(NamedTuple):
    """The baseline's budget ÷ what an arm needs of it to be as good: a geometric mean over seeds.

    `seeds` counts common ones. `never` of them did not get there, which leaves the factor unknown
    (NaN); `at_once` of them were there at their first evaluation, which makes it a lower bound.
    """

    factor: Estimate
    seeds: int
    never: int
    at_once: int

    def __str__(self) -> str:
        if not self.seeds:
            return 'no common seed'
        if self.never:
            of = f' with {self.never} of {self.seeds} seeds' if self.never < self.seeds else ''
            return f'not reached{of}'
        if math.isnan(self.factor.mean):
            return 'not measured'
        if self.at_once:
            return f'> {self.factor.mean:.2f} ×'
        if math.isnan(self.factor.low):
            return f'{self.factor.mean:.2f} × (one seed)'
        return f'{self.factor.mean:.2f} × ({self.factor.low:.2f} to {self.factor.high:.2f})'


def speed_up(arm: Mapping[int, StudyRun], baseline: Mapping[int, StudyRun], budget: str) -> SpeedUp:
    """Compares what arm and baseline spend on the baseline's final value, paired by seed.

    An arm gets there where its held-out curve, straight between evaluations, first does. Its
    learning rate has not decayed there as the baseline's has at its end, which counts against it.

    Args:
      arm, baseline: seed → run.
      budget: one of BUDGETS.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    reached = [_spent(arm[seed], baseline[seed].value, budget) for seed in seeds]
    never = sum(math.isnan(spent) for spent, _ in reached)
    at_once = sum(first for _, first in reached)
    logs = [
        math.log(getattr(baseline[seed], budget) / spent)
        for seed, (spent, _) in zip(seeds, reached, strict=True)
        if spent > 0 and getattr(baseline[seed], budget) > 0
    ]
    factor = Estimate(math.nan, math.nan, math.nan)
    if logs and len(logs) == len(seeds):
        mean, low, high = estimate(logs)
        # Lower bounds have no interval.
        ends = (math.nan, math.nan) if at_once else (math.exp(low), math.exp(high))
        factor = Estimate(math.exp(mean), *ends)
    return SpeedUp(factor, len(seeds), never, at_once)


def _spent(run: StudyRun, value: float, budget: str) -> tuple[float, bool]:
    """Budget at which a run's curve first is at the value or below, NaN if never; if at once."""
    curve = [(getattr(point, budget), point.value) for point in run.points]
    curve = [point for point in curve or [(getattr(run, budget), run.value)] if point[1] < math.inf]
    for n, (spent, reached) in enumerate(curve):
        if reached <= value:
            if n == 0:
                return float(spent), True
            before, above = curve[n - 1]
            return before + (above - value) / (above - reached) * (spent - before), False
    return math.nan, False
