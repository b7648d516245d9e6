"""The TPU kernels in interpret mode, with race detection, against float64 and each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels.attention import Setting, Tokens, tpu
from helios_jax.kernels.attention.tpu import work
from helios_jax.kernels.quantize import dequantize, store
from helios_jax.verify import attention as verify
from helios_jax.verify import cases
from helios_jax.verify.oracle import oracle, visible

INTERPRET = pltpu.InterpretParams(detect_races=True)
RACE = 'RACE DETECTED'  # printed by jax 0.10, raised since
attention = functools.partial(tpu.attention, interpret=INTERPRET)
PAIRS, TRIPLES = cases.covering(), cases.covering(3)
IN_CI = [
    case
    for case in PAIRS
    if 1 < case.T < 1000 or case.name.startswith(('bfloat16-H64-G1-T1-', 'bfloat16-H128-G4-T1500'))
]


@pytest.fixture(autouse=True)
def no_race(capsys):
    yield
    pltpu.reset_tpu_interpret_mode_state()  # after a failure it would spoil the next test
    assert RACE not in capsys.readouterr().out


def test_a_race_is_noticed(capsys):
    def kernel(x_ref, out_ref, scratch, semaphore):
        copy = pltpu.make_async_copy(x_ref, scratch, semaphore)
        copy.start()
        out_ref[...] = scratch[...]
        copy.wait()

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=INTERPRET,
    )
    try:
        jax.block_until_ready(call(jnp.ones((8, 128))))
        message = ''
    except Exception as error:
        message = str(error)
    assert RACE in capsys.readouterr().out + message


@pytest.mark.parametrize(
    'case',
    [
        # Of those with long rows, and with one token, one runs in CI, all before a release.
        pytest.param(case, marks=pytest.mark.slow if case in IN_CI else pytest.mark.long)
        for case in PAIRS
    ],
    ids=lambda case: case.name,
)
def test_errors_stay_near_those_of_a_plain_computation(case):
    [check] = verify.check(verify.kernels(case), [case])
    assert not check.faults


@pytest.mark.long
@pytest.mark.parametrize('case', [c for c in TRIPLES if c not in PAIRS], ids=lambda case: case.name)
def test_errors_stay_near_those_of_a_plain_computation_for_triples(case):
    [check] = verify.check(verify.kernels(case), [case])
    assert not check.faults


def problem(**levels):
    """A problem of one call, float32 unless it says otherwise."""
    levels = {
        'dtype': 'float32', 'H': 64, 'G': 3, 'T': 300, 'keys': 'own', 'mask': 'segments',
        'softcap': 0.0, 'yarn': 'static',
    } | levels  # fmt: skip
    return cases.example(cases.Case(**levels))


def forward(q, k, v, call):
    out, lse = verify.jitted(functools.partial(tpu.forward, interpret=INTERPRET), q, k, v, *call)
    assert out.dtype == q.dtype
    assert lse.dtype == np.float32
    return out, lse


def backward(q, k, v, out, lse, cotangent, call):
    run = functools.partial(tpu.backward, interpret=INTERPRET)
    gradients = verify.jitted(run, q, k, v, out, lse, cotangent, *call)
    assert [x.dtype for x in gradients] == [q.dtype] * 3
    return gradients


LSE_CASES = {
    'bfloat16': {'dtype': 'bfloat16', 'softcap': 20.0, 'G': 8},
    'ring': {'keys': 'ring', 'mask': 'segments_window', 'H': 96},  # some queries see nothing
    'decode': {'keys': 'slice', 'T': 1, 'mask': 'causal', 'softcap': 20.0},
    'bucket': {'keys': 'slice', 'T': 100, 'yarn': 'dynamic'},
}


@pytest.mark.slow
@pytest.mark.parametrize('name', LSE_CASES)
def test_log_sum_exp_and_what_backward_makes_of_it(name):
    levels = LSE_CASES[name]
    dtype = levels.get('dtype', 'float32')
    rows = problem(**levels)
    call = rows.calls[-1]
    out, lse = forward(*rows[:3], call)
    exact = oracle(*rows[:4], *call).lse
    plain = oracle(*rows[:4], *call, operand=dtype).lse
    seen = np.isfinite(exact)
    assert seen.all() == (name == 'decode')
    assert (lse[~seen] == -np.inf).all()
    lse_, exact, plain = lse[seen], exact[seen], plain[seen]
    allowed = 2 * np.abs(plain - exact).max() + 1e-5 * np.abs(exact).max()
    np.testing.assert_allclose(lse_, exact, rtol=0, atol=allowed)
    gradients = backward(*rows[:3], out, lse, rows.cotangent, call)
    faults, _ = verify.judge(rows._replace(calls=[call]), dtype, [out, *gradients])
    assert not faults


@pytest.mark.slow
@pytest.mark.parametrize('at', [(3, 95), (130, 100), (280, 280)])
def test_no_query_sees_the_future_or_another_document(at):
    """The gradient of one query a row tells."""
    rows = problem()
    [call] = rows.calls
    others = np.arange(300)[None] != np.array(at)[:, None]
    rows.cotangent[others] = 0
    _, dq, dk, dv = verify.run(attention, rows)
    positions, ids = call.tokens.positions, call.tokens.segment_ids
    seen = visible(positions, positions, ids, None, 0)[~others]
    assert seen.any() == (at != (280, 280))  # both rows end in padding
    assert (np.abs(dv[seen]) > 0).all()
    assert (np.abs(dk[seen & (seen.sum(1) > 1)[:, None]]).max(-1) > 0).all()
    assert not dv[~seen].any()
    assert not dk[~seen].any()
    assert not dq[others].any()


def order(kind, length, seed):
    if kind == 'random':
        return np.random.default_rng(seed).permutation(length)
    chunks = np.array_split(np.arange(length), 8)
    return np.concatenate([chunks[c] for c in (0, 7, 1, 6, 2, 5, 3, 4)])


@pytest.mark.parametrize(
    ('mask', 'kind'),
    [
        pytest.param('segments', 'zigzag', marks=pytest.mark.slow),
        pytest.param('segments_window', 'random', marks=pytest.mark.slow),
        pytest.param('window', 'random', marks=pytest.mark.long),
    ],
)
def test_the_order_of_rows_does_not_matter(mask, kind):
    rows = problem(T=600, mask=mask)
    [call] = rows.calls
    queries, keys = order(kind, 600, seed=1), order(kind, 600, seed=2)
    positions, ids, *_ = call.tokens
    moved = Tokens(positions[:, queries], key_positions=positions[:, keys])
    if 'segments' in mask:
        moved = moved._replace(segment_ids=ids[:, queries], key_segment_ids=ids[:, keys])
    arrays = zip(rows[:4], (queries, keys, keys, queries), strict=True)
    permuted = cases.Example(*(x[:, at] for x, at in arrays), [call._replace(tokens=moved)])
    expected, actual = verify.run(attention, rows), verify.run(attention, permuted)
    for got, want, at in zip(actual, expected, (queries, queries, keys, keys), strict=True):
        np.testing.assert_allclose(got, want[:, at], rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_blocks_of_keys_merge_by_their_log_sum_exp():
    """Ring attention sees one block at a time."""
    rows = problem(keys='ring', mask='causal', softcap=20.0)
    [call] = rows.calls
    pieces = []
    for some in (slice(0, 177), slice(177, None)):
        tokens = call.tokens._replace(key_positions=call.tokens.key_positions[:, some])
        pieces.append((rows.k[:, some], rows.v[:, some], call._replace(tokens=tokens)))
    outs, sums = zip(*(forward(rows.q, *piece) for piece in pieces), strict=True)
    lse = np.logaddexp(*sums)
    some, none = np.isfinite(lse), np.isneginf(lse)
    assert none.any()
    assert any((some & np.isneginf(one)).any() for one in sums)
    shares = [np.exp(one - np.where(none, 0, lse)).swapaxes(1, 2)[..., None] for one in sums]
    out = outs[0] * shares[0] + outs[1] * shares[1]
    whole_out, whole_lse = forward(*rows[:3], call)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, whole_out, rtol=0, atol=3e-5)
    first, second = (
        backward(rows.q, k, v, out, lse, rows.cotangent, piece) for k, v, piece in pieces
    )
    dk, dv = (np.concatenate([first[i], second[i]], axis=1) for i in (1, 2))
    faults, _ = verify.judge(rows, 'float32', [out, first[0] + second[0], dk, dv])
    assert not faults


@pytest.mark.slow
def test_what_is_not_seen_may_be_huge():
    """Keys of the future and of padding, whose weights overflow unless they are masked."""
    rows = problem(dtype='bfloat16', T=600, mask='causal')
    cut = 410
    rows.cotangent[:, cut:] = 0
    huge = rows._replace(k=rows.k.copy(), v=rows.v.copy())
    huge.k[:, cut:] *= 1e4
    huge.v[:, cut:] *= 1e4
    expected, actual = verify.run(attention, rows), verify.run(attention, huge)
    for got, want in zip(actual, expected, strict=True):
        assert np.isfinite(got.astype(np.float32)).all()
        np.testing.assert_array_equal(got[:, :cut], want[:, :cut])
    assert not any(gradient[:, cut:].any() for gradient in actual[1:])
    ids = np.where(np.arange(600) < cut, 1, 0)[None].astype(np.int32)
    [call] = rows.calls
    tokens = call.tokens._replace(segment_ids=np.repeat(ids, len(rows.q), axis=0))
    call = call._replace(tokens=tokens)
    padded = verify.run(attention, huge._replace(calls=[call]))
    for got, want in zip(padded, expected, strict=True):
        np.testing.assert_array_equal(got[:, :cut], want[:, :cut])
        assert not got[:, cut:].any()


@pytest.mark.parametrize(
    ('form', 'keys'),
    [
        pytest.param('fp8', 'own', marks=pytest.mark.slow),
        pytest.param('int8', 'ring', marks=pytest.mark.long),
    ],
)
def test_backward_reads_what_the_forward_kernel_stored(form, keys):
    """Bit for bit the gradients at the restored arrays, and the output as without storage."""
    rows = problem(dtype='bfloat16', keys=keys, H=96, softcap=20.0)
    [call] = rows.calls
    options = {'interpret': INTERPRET, 'blocks': (verify.SMALL, verify.SMALL)}
    stored = functools.partial(tpu.attention, residuals=form, **options)
    out, *gradients = verify.run(stored, rows)
    expected, lse = verify.jitted(functools.partial(tpu.forward, **options), *rows[:3], *call)
    np.testing.assert_array_equal(out, expected)
    q, k, v = (np.asarray(dequantize(store(jnp.asarray(x), form), str(x.dtype))) for x in rows[:3])
    backward = functools.partial(tpu.backward, **options)
    expected = verify.jitted(backward, q, k, v, out, lse, rows.cotangent, *call)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert any((x != y).any() for x, y in zip(rows[:3], (q, k, v), strict=True))


@pytest.mark.parametrize(
    'residuals',
    [pytest.param('', marks=pytest.mark.slow), pytest.param('int8', marks=pytest.mark.long)],
)
def test_keys_beyond_the_memory_come_in_chunks(residuals, monkeypatch):
    rows = problem(T=1500, mask='segments', G=2)
    own = functools.partial(attention, residuals=residuals, blocks=(verify.SMALL, verify.SMALL))
    expected = verify.run(own, rows)
    monkeypatch.setattr(tpu.backward_kernel, 'keys_in_memory', lambda *_, **__: 768)
    actual = verify.run(own, rows)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize('window', [pytest.param(0, marks=pytest.mark.slow), 150])
@pytest.mark.parametrize('kind', ['plain', 'packed', 'shuffled'])
def test_what_is_listed_is_what_is_seen(kind, window):
    """Each visible pair is in a listed strip, once; what is not masked is seen by all."""
    blocks, T = work.Blocks(q=128, k=384, strip=128, run=2, width=128), 1536
    rng = np.random.default_rng(window)
    cuts = np.sort(rng.integers(0, T, 0 if kind == 'plain' else 5))
    ids = 1 + np.searchsorted(cuts, np.arange(T), side='right')
    positions = np.arange(T) - np.array([0, *cuts])[ids - 1]
    ids = np.where(ids == 6, 0, ids)
    if kind == 'shuffled':
        at = rng.permutation(T)
        ids, positions = ids[at], positions[at]
    q = np.stack([np.where(ids > 0, ids, work.NOBODY), positions])[None].astype(np.float32)
    k = np.stack([ids, positions])[None].astype(np.float32)
    listed = work.make(q, k, blocks, window, ordered=kind != 'shuffled')
    traced = jax.jit(
        lambda q, k: work.make(q, k, blocks, window, ordered=kind != 'shuffled')
    )(q, k)  # fmt: skip
    assert int(traced.count) == listed.count
    for made, constant in zip(traced.items, listed.items, strict=True):
        np.testing.assert_array_equal(made[: listed.count], constant)

    seen = visible(positions[None], positions[None], ids[None], None, window)[0]
    computed = np.zeros((T // blocks.q, T // blocks.strip), int)
    words = work.Items(*map(np.asarray, listed.items))
    at = work.spans(words.strips)
    queries, keys = words.queries & 0xFFFF, words.keys >> 16
    for item in range(listed.count):
        strips = keys[item] * (blocks.k // blocks.strip) + np.arange(blocks.k // blocks.strip)
        span = [strips[a[item] : b[item]] for a, b in ((at.first, at.end), (at.full, at.mixed))]
        computed[queries[item], span[0]] += 1
        for strip in span[1]:
            rows = slice(queries[item] * blocks.q, (queries[item] + 1) * blocks.q)
            assert seen[rows, strip * blocks.strip : (strip + 1) * blocks.strip].all()
    tiles = seen.reshape(T // blocks.q, blocks.q, T // blocks.strip, blocks.strip)
    assert (computed <= 1).all()
    assert (computed >= tiles.any((1, 3))).all()
    if kind != 'shuffled':
        np.testing.assert_array_equal(computed, tiles.any((1, 3)))
        assert sum(at.mixed - at.full) == tiles.all((1, 3)).sum()
    flags = words.strips
    for first, last, block in (
        (work.FIRST_Q, work.LAST_Q, queries),
        (work.FIRST_K, work.LAST_K, keys),
    ):
        for flag, pick in ((first, 0), (last, -1)):
            marked = np.flatnonzero(flags & flag)
            assert sorted(block[marked]) == sorted(set(block))
            assert all(np.flatnonzero(block == block[i])[pick] == i for i in marked)


@pytest.mark.slow
def test_two_cores_share_the_key_heads():
    visits = set()

    def record(token, point, core):
        visits.add((int(point[0]), int(core)))
        return token

    two = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, grid_point_recorder=record
    )
    rows = problem(G=1, T=200)
    results = verify.run(functools.partial(tpu.attention, interpret=two), rows)
    assert sorted(head for head, _ in visits) == sorted(core for _, core in visits) == [0, 1]
    faults, _ = verify.judge(rows, 'float32', results)
    assert not faults


@pytest.mark.slow
@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take many minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.fixed_dictionaries(
        {
            'B': st.integers(1, 2),
            'K': st.integers(1, 2),
            'G': st.sampled_from([1, 2, 3, 5]),
            'H': st.sampled_from([64, 96, 128, 192, 256]),
            'T': st.integers(1, 400),
            'S': st.integers(1, 400),
            'documents': st.integers(1, 12),
        }
    ),
    keys=st.sampled_from(['own', 'own, some queries masked', 'sorted', 'shuffled']),
    float_positions=st.booleans(),
    dtype=st.sampled_from(['bfloat16', 'float32']),
    window=st.one_of(st.just(0), st.integers(1, 300)),
    softcap=st.sampled_from([0.0, 7.0]),
    query_scale=st.sampled_from([1.0, 1.33]),
    seed=st.integers(0, 2**32),
)
def test_any_rows(sizes, keys, float_positions, dtype, window, softcap, query_scale, seed):
    rng = np.random.default_rng(seed)
    B, K, G, H, T, S = (sizes[name] for name in 'BKGHTS')
    S = T if keys.startswith('own') else S
    tokens = any_tokens(rng, sizes | {'S': S}, keys)
    if float_positions:
        at = (None if x is None else x.astype(np.float32) for x in tokens[::2])
        tokens = tokens._replace(**dict(zip(('positions', 'key_positions'), at, strict=True)))
    setting = Setting(
        (1e4 ** (-np.arange(H // 2) / (H // 2))).astype(np.float32),
        np.asarray(query_scale, np.float32),
        0.9 / math.sqrt(H),
        window,
        softcap,
    )
    shapes = (B, T, K * G, H), (B, S, K, H), (B, S, K, H), (B, T, K * G, H)
    arrays = [rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes]
    rows = cases.Example(*arrays, [cases.Call(tokens, setting)])
    faults, _ = verify.judge(rows, dtype, verify.run(attention, rows))
    assert not faults


def any_tokens(rng, sizes, keys):
    """Documents with ids in no order, one of them padding; T and S tokens of them, or all."""
    B, T, S, M = sizes['B'], sizes['T'], sizes['S'], max(sizes['T'], sizes['S'])
    ids, positions = np.zeros((B, M), np.int32), np.zeros((B, M), np.int32)
    for b in range(B):
        ends = np.sort(rng.integers(0, M + 1, sizes['documents']))
        document = np.searchsorted(ends, np.arange(M), side='right')
        ids[b] = rng.permutation(len(ends) + 1)[document]
        positions[b] = np.arange(M) - np.array([0, *ends])[document] + rng.integers(3000)
    if keys == 'own, some queries masked':
        some = rng.integers(2, size=ids.shape, dtype=np.int32)
        return Tokens(positions, ids * some, key_segment_ids=ids)
    if keys in ('sorted', 'shuffled'):
        q_at, k_at = rng.permutation(M)[:T], rng.permutation(M)[:S]
        if keys == 'sorted':
            q_at, k_at = np.sort(q_at), np.sort(k_at)
        return Tokens(positions[:, q_at], ids[:, q_at], positions[:, k_at], ids[:, k_at])
    return Tokens(positions, ids)
