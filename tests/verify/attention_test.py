"""The oracle against the definition, the covering array, and what the bound lets through."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

from helios_jax.kernels.attention import reference
from helios_jax.verify import attention as verify
from helios_jax.verify import cases
from helios_jax.verify.cases import FACTORS
from helios_jax.verify.oracle import oracle, rounded_to, visible

CASE = cases.Case(
    dtype='bfloat16', H=64, G=3, T=60, keys='slice', mask='segments_window', softcap=20.0,
    yarn='static',
)  # fmt: skip


def change(**levels):
    return dataclasses.replace(CASE, **levels)


def exact(given):
    return [x.astype(np.float64) for x in given[:4]]


@pytest.mark.parametrize('case', [CASE, change(keys='ring', softcap=0.0), change(keys='own', T=1)])
def test_the_oracle_follows_the_definition(case):
    given = cases.example(case)
    [call] = given.calls
    q, k, v, _ = exact(given)
    got = oracle(*given[:4], *call)
    positions, ids, key_positions, key_ids = call.tokens
    key_positions = positions if key_positions is None else key_positions
    key_ids = ids if key_ids is None else key_ids
    frequencies, query_scale, _, window, _ = call.setting

    def turned(x, t):
        low, high = np.split(x, 2)
        turned = (low + 1j * high) * np.exp(1j * t * frequencies.astype(np.float64))
        return np.concatenate([turned.real, turned.imag])

    rng = np.random.default_rng(0)
    for _ in range(25):
        b, t, n = (rng.integers(size) for size in q.shape[:3])
        logits, values = [], []
        for s in range(k.shape[1]):
            distance = positions[b, t] - key_positions[b, s]
            same = ids[b, t] == key_ids[b, s] != 0
            if same and 0 <= distance < window:
                query = turned(q[b, t, n], positions[b, t]) * float(query_scale)
                key = turned(k[b, s, n // case.G], key_positions[b, s])
                logit = query @ key / math.sqrt(case.H)
                logits.append(20 * math.tanh(logit / 20) if case.softcap else logit)
                values.append(v[b, s, n // case.G])
        weights = np.exp(logits)
        lse = np.log(weights.sum()) if logits else -np.inf
        out = weights @ np.array(values) / weights.sum() if logits else np.zeros(case.H)
        np.testing.assert_allclose(got.lse[b, n, t], lse, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(got.out[b, t, n], out, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('case', [CASE, change(keys='own', softcap=0.0), change(keys='ring')])
@pytest.mark.parametrize('index', [0, 1, 2])
def test_the_oracles_gradients_are_slopes(index, case):
    given = cases.example(case)
    *arrays, cotangent = exact(given)
    direction = np.random.default_rng(1).normal(size=arrays[index].shape)

    def loss(step):
        moved = [*arrays[:index], arrays[index] + step * direction, *arrays[index + 1 :]]
        return np.vdot(oracle(*moved, cotangent, *given.calls[0]).out, cotangent)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    gradient = oracle(*arrays, cotangent, *given.calls[0])[1 + index]
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-6, atol=1e-6)


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


def edit(**edits):
    def edited(given):
        made = {n: f(getattr(given, n)) for n, f in edits.items() if n in given._fields}
        return given._replace(**made)

    return lambda given: given._replace(
        calls=[cases.Call(*map(edited, call)) for call in given.calls]
    )


def one_document(ids):
    return np.minimum(ids, 1)


WRONG_PROBLEMS = {
    'window one too wide': edit(window=lambda w: w + 1),
    'no window': edit(window=lambda w: 0),
    'no cap': edit(softcap=lambda c: 0.0),
    'no query scale': edit(query_scale=lambda m: np.ones_like(m)),
    'not rotated': edit(frequencies=np.zeros_like),
    'rotated backwards': edit(frequencies=np.negative),
    'one document': edit(segment_ids=one_document, key_segment_ids=one_document),
    'padding seen': edit(segment_ids=lambda i: i + 1, key_segment_ids=lambda i: i + 1),
    'future seen': edit(positions=lambda p: p + 1),
    'present unseen': edit(positions=lambda p: p - 1),
    'scaled by 1.02': edit(scale=lambda s: 1.02 * s),
}


def spoil(name, at, value):
    def apply(results):
        array = getattr(results, name).copy()
        array[at] = value
        return results._replace(**{name: array})

    return apply


WRONG_RESULTS = {
    'NaN': spoil('dv', (0, 3, 1, 5), np.nan),
    'infinite': spoil('out', (0, 3, 1, 5), np.inf),
    'one row of dq': spoil('dq', (1, 40), 0),
    'one key': spoil('dk', (0, 60, 1), 0),
    'a head too few': lambda r: r._replace(dk=r.dk * 2 / 3),
    'dead key': lambda r: r._replace(dv=r.dv + 1e-9),
    'padding': lambda r: r._replace(out=r.out + 1e-9),
}


def judged(case, spoilt_problem=lambda x: x, spoilt_results=lambda x: x, operand=''):
    given = cases.example(case)
    wrong = spoilt_problem(given)
    results = oracle(*wrong[:4], *wrong.calls[0], operand=operand)
    results = [rounded_to(x, case.dtype) for x in spoilt_results(results)[:4]]
    return verify.judge(given, case.dtype, results)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_the_right_results_pass(dtype):
    faults, worst = judged(change(dtype=dtype))
    assert not faults
    assert worst < 0.5
    faults, worst = judged(change(dtype=dtype), operand=dtype)
    assert not faults
    assert worst <= 0.5


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('mistake', WRONG_PROBLEMS)
def test_a_mistake_is_noticed(mistake, dtype):
    faults, worst = judged(change(dtype=dtype), spoilt_problem=WRONG_PROBLEMS[mistake])
    assert faults
    assert worst > 1


@pytest.mark.parametrize('mistake', WRONG_RESULTS)
def test_a_wrong_entry_is_noticed(mistake):
    assert judged(CASE, spoilt_results=WRONG_RESULTS[mistake])[0]


def test_float32_that_is_really_bfloat16_is_noticed():
    faults, worst = judged(change(dtype='float32'), operand='bfloat16')
    assert len(faults) == 8
    assert worst > 10


def test_verify_runs_attention_and_its_gradient():
    chosen = [change(yarn='dynamic', keys='own')]
    checks = list(verify.check(reference.attention, chosen))
    assert [check.case for check in checks] == chosen
    assert not any(check.faults for check in checks)
    uncapped = functools.partial(capless, reference.attention)
    [check] = verify.check(uncapped, chosen)
    assert {fault.split()[0] for fault in check.faults} == {'out', 'dq', 'dk', 'dv'}


def capless(attention, *arguments):
    *arguments, setting = arguments
    assert setting.softcap
    return attention(*arguments, setting._replace(softcap=0.0))
