import math

import numpy as np
import pytest
import scipy.stats
import studies

from helios_jax.ablate import statistics
from helios_jax.errors import UserError

NOISE = 0.02  # standard deviation over seeds


def made(rng, effects, num_seeds, shared=0.1):
    """Values of arms whose seeds share what their data does."""
    data = shared * rng.standard_normal(num_seeds)
    return {
        arm: 2 + effect + data + NOISE * rng.standard_normal(num_seeds)
        for arm, effect in effects.items()
    }


@pytest.mark.parametrize('num_seeds', [2, 3, 11])
def test_a_comparison_is_scipys_paired_t_test(num_seeds):
    values = made(np.random.default_rng(num_seeds), {'base': 0, 'a': 0.1, 'b': -0.01}, num_seeds)
    for found in statistics.compare(studies.of_values(values)):
        oracle = scipy.stats.ttest_rel(values[found.arm], values['base'])
        interval = oracle.confidence_interval(0.95)
        assert found.p == pytest.approx(oracle.pvalue, rel=1e-9)
        assert found.difference == pytest.approx(
            (np.mean(values[found.arm] - values['base']), interval.low, interval.high), rel=1e-9
        )
        assert found.seeds == tuple(range(1, num_seeds + 1))


def test_an_interval_is_near_a_bootstraps():
    samples = np.random.default_rng(0).normal(3, 2, 90)
    oracle = scipy.stats.bootstrap(
        (samples,), np.mean, n_resamples=3000, rng=np.random.default_rng(1)
    ).confidence_interval
    found = statistics.estimate(samples)
    width = found.high - found.low
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=width / 15)


def test_equal_values_are_no_evidence_and_equal_differences_are():
    p = statistics.paired_p(np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]))
    assert p.tolist() == [1.0, 0.0]


def test_holms_correction_by_hand_in_any_order():
    p = np.array([[0.01, 0.04, 0.03, 0.005], [0.9, 0.8, 0.7, 0.6]])
    assert statistics.holm(p) == pytest.approx(
        np.array([[0.03, 0.06, 0.06, 0.02], [1.0, 1.0, 1.0, 1.0]])
    )


def test_of_studies_without_an_effect_at_most_six_in_a_hundred_find_one():
    rng = np.random.default_rng(3)
    drawn = [made(rng, dict.fromkeys(('base', 'a', 'b', 'c'), 0.0), 3) for _ in range(1000)]
    values = np.array([[*study.values()] for study in drawn])  # [studies, arms, seeds]
    corrected = statistics.holm(statistics.paired_p(values[:, 1:] - values[:, :1]))
    assert 0.01 < (corrected < 0.05).any(axis=-1).mean() <= 0.06
    for study, p in zip(drawn[:50], corrected, strict=False):  # as a study's own comparison is
        compared = statistics.compare(studies.of_values(study))
        assert [c.corrected_p for c in compared] == pytest.approx(p)


@pytest.mark.parametrize(('floors', 'num_seeds'), [(1, 10), (4, 3)])
def test_an_effect_is_found_as_often_as_the_power_says(floors, num_seeds):
    rng, studied = np.random.default_rng(5), 6000
    paired = NOISE * math.sqrt(2)  # two runs differ
    stated = statistics.power(floors * paired, paired, num_seeds)
    differences = rng.normal(-floors * paired, paired, (studied, num_seeds))
    found = (statistics.paired_p(differences) < 0.05).mean()
    assert 0.3 < stated < 0.99
    assert found == pytest.approx(stated, abs=4 * math.sqrt(stated * (1 - stated) / studied))


def test_power_is_that_of_a_level_shared_by_the_comparisons():
    assert statistics.power(0.0, 1.0, 5, 4) == pytest.approx(0.05 / 4 / 2)  # with the right sign
    power = statistics.power
    assert power(1.0, 1.0, 5, 4) < power(1.0, 1.0, 5) < power(-1.0, 1.0, 6)


@pytest.mark.parametrize(('num_seeds', 'comparisons'), [(2, 1), (3, 7)])
def test_a_detectable_difference_is_found_with_that_chance(num_seeds, comparisons):
    effect = statistics.detectable(NOISE, num_seeds, comparisons, chance=0.7)
    assert statistics.power(effect, NOISE, num_seeds, comparisons) == pytest.approx(0.7)


def test_the_noise_floor_is_pooled_over_arms():
    values = {'base': [1.0, 3.0], 'a': [2.0, 5.0], 'b': [7.0]}
    floor = statistics.noise_floor(studies.of_values(values))
    # Squares 2 and 4.5 with one freedom each; differences 1 and 2 of `a`, one of `b`.
    assert floor == pytest.approx((math.sqrt(6.5 / 2), math.sqrt(0.5)))
    assert all(map(math.isnan, statistics.noise_floor(studies.of_values({'base': [1.0]}))))


def test_the_data_that_seeds_share_is_no_noise_of_a_difference():
    values = made(np.random.default_rng(7), dict.fromkeys('abcdef', 0.0), 40, shared=0.5)
    floor = statistics.noise_floor(studies.of_values(values))
    assert floor.within > 0.3
    assert floor.paired == pytest.approx(NOISE * math.sqrt(2), rel=0.15)


def test_verdicts_and_groups_do_not_rank_within_noise():
    steady = np.array([0.0, 0.001, -0.001, 0.002])
    base = np.array([2.0, 2.3, 1.9, 2.1])
    values = {
        'base': base,
        'best': base - 0.5 + steady,
        'good': base - 0.4 - steady,
        'alike': base + 0.01 * np.array([1, -1, 2, -2]),
        'bad': base + 0.3 + steady,
        'short': base[:1] - 1,
    }
    results = studies.of_values(values)
    verdicts = {c.arm: c.verdict for c in statistics.compare(results)}
    assert verdicts == {
        'best': 'better', 'good': 'better', 'alike': 'no difference found', 'bad': 'worse',
        'short': 'fewer than two common seeds',
    }  # fmt: skip
    assert statistics.ranking(results) == [('best', 'good'), ('base', 'alike'), ('bad',)]
    short = statistics.compare(results)[-1]
    assert short.difference.mean == pytest.approx(-1) and math.isnan(short.difference.low)
    assert math.isnan(short.p) and math.isnan(short.corrected_p)


def test_failed_missing_and_swept_runs_are_left_out_and_named():
    runs = [
        studies.run('residual', 1, 2.0), studies.run('residual', 2, 3.0),
        studies.run('convex', 1, 1.5), studies.run('convex', 2, math.nan),
        studies.run('convex', 3, math.nan, state='failed', reason='the loss is nan at step 7'),
        studies.run('convex', 4, math.nan, state='missing'),
        studies.run('convex', 2, 0.1, swept=True),
    ]  # fmt: skip
    results = studies.results(runs)
    assert {arm: [*own] for arm, own in statistics.compared(results).items()} == {
        'residual': [1, 2], 'convex': [1],
    }  # fmt: skip
    assert [(run.seed, why) for run, why in statistics.left_out(results)] == [
        (2, 'its value is nan'), (3, 'the loss is nan at step 7'), (4, 'missing'),
    ]  # fmt: skip
    (comparison,) = statistics.compare(results)
    assert comparison.seeds == (1,) and comparison.verdict == statistics.UNKNOWN


def test_without_a_baseline_nothing_is_compared():
    (comparison,) = statistics.compare(studies.results([studies.run('convex')]))
    assert comparison.seeds == () and math.isnan(comparison.difference.mean)


@pytest.mark.parametrize(
    ('values', 'rate', 'at_end'),
    [
        ({1e-4: [3.0], 1e-3: [2.0], 1e-2: [2.5]}, 1e-3, False),
        ({1e-4: [3.0], 1e-3: [2.0, 2.4], 1e-2: [2.1]}, 1e-2, True),  # by the mean of its seeds
        ({1e-4: [2.0], 1e-3: [2.5]}, 1e-4, True),
        ({1e-4: [3.0], 1e-3: [2.0], 1e-2: [math.nan]}, 1e-3, False),  # what diverged is an end
    ],
)
def test_the_best_rate_and_whether_it_lies_at_an_end(values, rate, at_end):
    runs = [
        studies.run('convex', seed, v, rate=r, state='done' if v > 0 else 'failed', swept=True)
        for r, own in values.items()
        for seed, v in enumerate(own)
    ]
    best = statistics.best_rate(runs[::-1])
    assert (best.rate, best.at_end) == (rate, at_end)
    assert best.value == pytest.approx(np.mean(values[rate]))


def test_a_search_without_a_finished_run_is_an_error():
    runs = [studies.run('convex', value=math.nan, state='failed', rate=rate) for rate in (1.0, 0.1)]
    with pytest.raises(UserError, match='gave a finished run of convex'):
        statistics.best_rate(runs)


def test_spikes_stand_out_of_the_losses_before():
    rng = np.random.default_rng(9)
    losses = 5 - np.arange(90) / 40 + 0.01 * rng.uniform(-1, 1, 90)
    assert statistics.spikes(losses) == 0
    losses[[40, 41, 77]] += 1
    losses[3] += 9  # nothing before it tells
    assert statistics.spikes(losses) == 3
    assert statistics.spikes(losses[:20]) == statistics.spikes([]) == 0
