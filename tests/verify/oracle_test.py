"""The oracle against the definition, and against the slopes of its own results."""

import math

import numpy as np
import pytest
from verify_case import CASE, change

from helios_jax.verify import cases
from helios_jax.verify.oracle import oracle


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
    frequencies, query_scale, _, window, *_ = call.setting

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
