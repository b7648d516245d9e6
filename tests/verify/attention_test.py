"""What the bound on errors lets through, and which mistakes it notices."""

import functools

import numpy as np
import pytest
from verify_case import CASE, change

from helios_jax.kernels.attention import reference
from helios_jax.verify import attention as verify
from helios_jax.verify import cases
from helios_jax.verify.oracle import oracle, rounded_to

pytestmark = pytest.mark.usefixtures('quick_compilation')


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
