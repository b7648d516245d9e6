import math

import pytest
import scipy.stats
import studies

from helios_jax.ablate.speedup import speed_up


def arm(*curves, **fields):
    """Seed → run, one for each curve."""
    return {
        seed: studies.run('arm', seed, values[-1], points=studies.curve(*values), **fields)
        for seed, values in enumerate(curves, 1)
    }


BASE = arm([5.0, 4.0, 3.0], [5.5, 4.5, 3.5])


def test_an_arm_reaches_the_value_between_two_evaluations():
    # At 3.0: halfway from the first to the second third; at 3.5: a quarter of that way.
    found = speed_up(arm([4.0, 2.0, 1.0], [4.0, 2.0, 1.0]), BASE, 'tokens')
    factors = [1 / (1.5 / 3), 1 / (1.25 / 3)]
    assert found.factor.mean == pytest.approx(scipy.stats.gmean(factors), rel=1e-3)
    logs = [math.log(factor) for factor in factors]
    ends = scipy.stats.t.interval(0.95, 1, sum(logs) / 2, scipy.stats.sem(logs))
    assert math.log(found.factor.low) == pytest.approx(ends[0], rel=1e-2)
    assert math.log(found.factor.high) == pytest.approx(ends[1], rel=1e-2)
    assert (found.seeds, found.never, found.at_once) == (2, 0, 0)
    assert str(found).startswith('2.19 × (')


def test_each_budget_is_the_arms_own():
    twice = {  # the baseline's curve, at twice the FLOPs and three times the time
        seed: studies.run('arm', seed, run.value, points=[
            type(p)(p.step, p.tokens, 2 * p.flops, 3 * p.seconds, p.value) for p in run.points
        ])
        for seed, run in BASE.items()
    }  # fmt: skip
    found = {b: speed_up(twice, BASE, b).factor.mean for b in ('tokens', 'flops', 'seconds')}
    assert found == pytest.approx({'tokens': 1, 'flops': 1 / 2, 'seconds': 1 / 3})


@pytest.mark.parametrize(
    ('curves', 'said'),
    [
        (([4.0, 3.9, 3.8], [4.0, 3.9, 3.8]), 'not reached'),
        (([4.0, 2.0, 1.0], [4.0, 3.9, 3.8]), 'not reached with 1 of 2 seeds'),
        (([2.0, 1.9, 1.8], [2.0, 1.9, 1.8]), '> 3.00 ×'),
        (([4.0, 2.0, 1.0],), '2.00 × (one seed)'),
        ((), 'no common seed'),
        (([math.nan, math.nan, 2.0],) * 2, '> 1.00 ×'),  # its first evaluation that is a number
    ],
)
def test_what_is_not_known_exactly_is_said(curves, said):
    found = speed_up(arm(*curves), BASE, 'tokens')
    assert str(found) == said
    assert math.isnan(found.factor.low)


def test_a_budget_that_was_not_measured_has_no_speed_up():
    unknown = {1: studies.run('arm', 1, 2.0, flops=0.0)}
    assert str(speed_up(unknown, BASE, 'flops')) == 'not measured'
    assert str(speed_up(unknown, BASE, 'seconds')) == '> 1.00 ×'  # its end alone is known
