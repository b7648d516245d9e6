"""The covering array, and problems that are what their names say."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from verify_case import CASE, change

from helios_jax.verify import cases
from helios_jax.verify.cases import FACTORS
from helios_jax.verify.oracle import visible


@pytest.mark.parametrize('strength', [2, 3])
def test_the_covering_array_covers(strength):
    chosen = [dataclasses.asdict(case) for case in cases.covering(strength)]
    assert len(chosen) <= 120
    for names in itertools.combinations(FACTORS, strength):
        met = {tuple(case[name] for name in names) for case in chosen}
        assert met == set(itertools.product(*(FACTORS[name] for name in names)))


def test_cases_are_the_whole_product():
    names = {case.name for case in cases.product()}
    assert len(names) == math.prod(map(len, FACTORS.values()))
    assert names >= {case.name for case in cases.covering(3)}


@pytest.mark.parametrize('keys', FACTORS['keys'])
@pytest.mark.parametrize('mask', FACTORS['mask'])
def test_problems_are_what_their_names_say(mask, keys):
    given = cases.example(change(keys=keys, mask=mask, yarn='dynamic'))
    (early, before), (late, after) = given.calls
    T, S = given.q.shape[1], given.k.shape[1]
    assert T == CASE.T
    assert (T == S) == (keys == 'own') == (early.key_positions is None)
    key_positions = early.positions if keys == 'own' else early.key_positions
    assert (np.diff(key_positions) < 0).any() == (keys == 'ring' or 'segments' in mask)
    assert before.frequencies[-1] > after.frequencies[-1]
    assert before.query_scale == 1.0 < after.query_scale
    live = [call.tokens.segment_ids != 0 for call in given.calls]
    assert not (live[0] & live[1]).any()
    assert live[0].any()
    assert live[1].any()
    assert (live[0] | live[1]).all() == ('segments' not in mask)
    assert (before.window > 0) == ('window' in mask)
    ids = late.segment_ids, late.key_segment_ids
    seen = visible(late.positions, key_positions, *ids, after.window)
    assert seen.any()
    if keys == 'ring':
        assert (live[1] & ~seen.any(2)).any() or (live[0] & ~seen.any(2)).any()
