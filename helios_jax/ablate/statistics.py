"""Compares the arms of a study with its baseline, paired by seed.

Lower values are better, as they are of every held-out figure of `helios train`. Only runs that are
done, of a finite value and not of a learning-rate search are compared; `left_out` has the others.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

from helios_jax.ablate.records import StudyResults, StudyRun
from helios_jax.errors import require

CONFIDENCE = 0.95
BETTER, WORSE, ALIKE = 'better', 'worse', 'no difference found'
UNKNOWN = 'fewer than two common seeds'
Key = TypeVar('Key')
SPIKE_WINDOW, SPIKE_DEVIATIONS = 20, 5  # lines of metrics.jsonl; median absolute deviations


class Estimate(NamedTuple):
    """A mean over seeds with its 95% interval, whose ends are NaN for fewer than two seeds."""

    mean: float
    low: float
    high: float


class Finding(NamedTuple):
    """Verdict on paired differences of values; the lower values are better."""

    difference: Estimate
    p: float  # of the two-sided paired t test; NaN for fewer than two seeds
    corrected_p: float  # by Holm's method, for all that were tested together
    verdict: str  # BETTER, WORSE, ALIKE or UNKNOWN


class Comparison(NamedTuple):
    """An arm against the baseline, over the seeds that both have, as `Finding`."""

    arm: str
    seeds: tuple[int, ...]
    difference: Estimate  # arm − baseline
    p: float
    corrected_p: float  # for all comparisons of the study
    verdict: str


class NoiseFloor(NamedTuple):
    """Standard deviations over seeds, pooled over arms; NaN where no arm has two seeds."""

    within: float  # of an arm's values
    paired: float  # of an arm's differences to the baseline


class BestRate(NamedTuple):
    """The learning rate of a search whose mean value is lowest."""

    rate: float
    value: float
    at_end: bool  # no rate on one side of it was tried: the best one may lie beyond


def compared(results: StudyResults) -> dict[str, dict[int, StudyRun]]:
    """Returns arm → seed → run, of the runs that are compared."""
    found: dict[str, dict[int, StudyRun]] = {arm.name: {} for arm in results.arms}
    for run in results.runs:
        if not run.swept and _usable(run):
            found[run.arm][run.seed] = run
    return found


def left_out(results: StudyResults) -> list[tuple[StudyRun, str]]:
    """Returns the runs that nothing is computed from, searches' too, each with the reason."""
    return [
        (run, run.reason or ('missing' if run.state == 'missing' else f'its value is {run.value}'))
        for run in results.runs
        if not _usable(run)
    ]


def estimate(samples: Sequence[float] | Float[np.ndarray, 'N']) -> Estimate:
    """Computes the mean of samples and its 95% interval by Student's t."""
    n, mean = len(samples), float(np.mean(samples)) if len(samples) else math.nan
    if n < 2:
        return Estimate(mean, math.nan, math.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(samples, ddof=1) / math.sqrt(n)
    return Estimate(mean, float(mean - half), float(mean + half))


def paired_p(differences: Float[np.ndarray, '*studies N']) -> Float[np.ndarray, '*studies']:
    """Computes p of the two-sided paired t test: of a mean difference of 0 over N ≥ 2 seeds."""
    n = differences.shape[-1]
    mean, deviation = differences.mean(axis=-1), differences.std(axis=-1, ddof=1)
    with np.errstate(divide='ignore', invalid='ignore'):
        t = np.abs(mean) / (deviation / math.sqrt(n))
    # Differences that are all 0 are no evidence; others that are all alike are as SciPy has them.
    return np.where(np.isnan(t), 1.0, 2 * stats.t.sf(t, n - 1))


def holm(p: Float[np.ndarray, '*studies arms']) -> Float[np.ndarray, '*studies arms']:
    """Corrects the p values of a study's comparisons, so that any false one among them is rare.

    Method of Holm (1979): of all studies without an effect, at most a share of α has a corrected p
    below α, however the comparisons depend on each other.
    """
    order, count = np.argsort(p, axis=-1), p.shape[-1]
    scaled = np.take_along_axis(p, order, axis=-1) * np.arange(count, 0, -1, dtype=float)
    stepped = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1)
    corrected = np.empty_like(stepped)
    np.put_along_axis(corrected, order, stepped, axis=-1)
    return corrected


def differences(results: StudyResults) -> dict[str, dict[int, float]]:
    """Returns arm → common seed → value of the arm − value of the baseline."""
    runs = compared(results)
    baseline = runs.pop(results.baseline)
    return {
        arm: {s: own[s].value - baseline[s].value for s in sorted(own.keys() & baseline.keys())}
        for arm, own in runs.items()
    }


def compare(results: StudyResults) -> list[Comparison]:
    """Compares each arm but the baseline with it, in the order of the arms."""
    found = differences(results)
    tested = findings({arm: [*own.values()] for arm, own in found.items()})
    return [Comparison(arm, tuple(own), *tested[arm]) for arm, own in found.items()]


def findings(differences: Mapping[Key, Sequence[float]]) -> dict[Key, Finding]:
    """Tests paired differences, a value a seed, and corrects for how many are tested together."""
    samples = {key: np.array(values, float) for key, values in differences.items()}
    tested = [key for key, values in samples.items() if len(values) >= 2]
    p = np.array([paired_p(samples[key]) for key in tested])
    p_of = dict(zip(tested, zip(p, holm(p), strict=True), strict=True))
    found = {}
    for key, values in samples.items():
        mean = estimate(values)
        alone, corrected = map(float, p_of.get(key, (math.nan, math.nan)))
        verdict = UNKNOWN if math.isnan(corrected) else ALIKE
        if corrected < 1 - CONFIDENCE:
            verdict = BETTER if mean.mean < 0 else WORSE
        found[key] = Finding(mean, alone, corrected, verdict)
    return found


def ranking(results: StudyResults) -> list[tuple[str, ...]]:
    """Groups arms, best first, by what was found; the arms of one group are not ranked.

    Groups are: better than the baseline, it and what differs from it by no more than noise, worse.
    Arms of fewer than two common seeds are in none.
    """
    groups: dict[str, list[str]] = {BETTER: [], ALIKE: [results.baseline], WORSE: []}
    for comparison in compare(results):
        if comparison.verdict != UNKNOWN:
            groups[comparison.verdict].append(comparison.arm)
    return [tuple(group) for group in groups.values() if group]


def noise_floor(results: StudyResults) -> NoiseFloor:
    """Measures how much seeds alone change a value, and a difference to the baseline."""
    values = [[run.value for run in own.values()] for own in compared(results).values()]
    return NoiseFloor(
        _pooled(values), _pooled([[*own.values()] for own in differences(results).values()])
    )


def power(effect: float, deviation: float, num_seeds: int, comparisons: int = 1) -> float:
    """Computes the chance that a difference is found, and its sign, from the noncentral t.

    Args:
      effect: the true difference to the baseline.
      deviation: standard deviation of paired differences over seeds.
      comparisons: of the study. Each is held to 0.05 ÷ comparisons, as by Holm's method if no other
        one finds anything: the chance is higher if others do.
    """
    freedom, shift = num_seeds - 1, abs(effect) / deviation * math.sqrt(num_seeds)
    critical = stats.t.ppf(1 - (1 - CONFIDENCE) / comparisons / 2, freedom)
    return float(stats.nct.sf(critical, freedom, shift))


def detectable(
    deviation: float, num_seeds: int, comparisons: int = 1, chance: float = 0.8
) -> float:
    """Computes the smallest true difference that is found with this chance, as `power` has it."""
    missing = lambda effect: power(effect, 1.0, num_seeds, comparisons) - chance
    most = 1.0
    while missing(most) < 0:
        most *= 2
    return deviation * optimize.brentq(missing, 0.0, most)


def searches(results: StudyResults) -> dict[str, list[StudyRun]]:
    """Returns arm → runs of its learning-rate search, of the arms that have one."""
    found = {
        arm.name: [run for run in results.runs if run.swept and run.arm == arm.name]
        for arm in results.arms
    }
    return {arm: runs for arm, runs in found.items() if runs}


def rates(runs: Sequence[StudyRun]) -> dict[float, float]:
    """Returns learning rate → mean value of a search's runs, in rising order; NaN where none is."""
    values: dict[float, list[float]] = collections.defaultdict(list)
    for run in runs:
        values[run.learning_rate] += [run.value] * _usable(run)
    return {rate: estimate(values[rate]).mean for rate in sorted(values)}


def best_rate(runs: Sequence[StudyRun]) -> BestRate:
    """Chooses the learning rate of one arm from the runs of its search.

    Raises:
      UserError: none of them finished.
    """
    tried = rates(runs)
    known = {rate: value for rate, value in tried.items() if math.isfinite(value)}
    names = ', '.join(sorted({run.arm for run in runs}))
    require(
        bool(known),
        f'no learning rate of {", ".join(map(str, tried))} gave a finished run of {names}; '
        'look at their reasons, or give lower rates.',
    )
    best = min(known, key=lambda rate: known[rate])
    return BestRate(best, known[best], at_end=best in (min(tried), max(tried)))


def spikes(losses: Sequence[float] | Float[np.ndarray, 'N']) -> int:
    """Counts losses that exceed the median of those before by SPIKE_DEVIATIONS times their MAD.

    These are the SPIKE_WINDOW before; MAD is their median absolute deviation from the median. The
    first SPIKE_WINDOW losses have too few before them, and do not count.
    """
    values = np.asarray(losses, float)
    if len(values) <= SPIKE_WINDOW:
        return 0
    before = np.lib.stride_tricks.sliding_window_view(values[:-1], SPIKE_WINDOW)
    median = np.median(before, axis=-1, keepdims=True)
    deviation = np.median(np.abs(before - median), axis=-1)
    return int((values[SPIKE_WINDOW:] > median[:, 0] + SPIKE_DEVIATIONS * deviation).sum())


def _usable(run: StudyRun) -> bool:
    return run.state == 'done' and math.isfinite(run.value)


def _pooled(groups: Sequence[Sequence[float]]) -> float:
    squares = sum(np.var(group) * len(group) for group in groups if group)
    freedom = sum(len(group) - 1 for group in groups if group)
    return float(np.sqrt(squares / freedom)) if freedom else math.nan
