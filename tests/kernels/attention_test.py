"""Every implementation of attention against one float64 oracle, forward and gradients."""

import functools
import inspect
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as private

from helios_jax.kernels import attention as door
from helios_jax.kernels.attention import attention, gpu, reference, tpu
from helios_jax.kernels.attention.rotation import rotate
from helios_jax.verify.oracle import oracle

B, K = 2, 2
H = 8 if jax.default_backend() == 'cpu' else 64  # accelerators' kernels want some width


def inputs(T, S, G, seed=0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, K * G, H), (B, S, K, H), (B, S, K, H), (B, T, K * G, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def frequencies():
    return (100.0 ** (-np.arange(H // 2) / (H // 2))).astype(np.float32)


def packed(T, lengths=((97, 41, 23), (2, 131))):
    """Rows of documents, then padding; positions restart with each document."""
    ids, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        start = 0
        for index, length in enumerate(lengths[row % len(lengths)], start=1):
            length = min(length, T - start)
            ids[row, start : start + length] = index
            positions[row, start : start + length] = np.arange(length)
            start += length
    return {'segment_ids': ids, 'positions': positions}


def plain(T):
    return np.tile(np.arange(T, dtype=np.int32), (B, 1))


def bucket(T):
    """Self-attention in which only some queries are asked for, none of them late in the row."""
    rows = packed(T)
    ids = rows['segment_ids']
    asked = np.where((rows['positions'] % 3 == 1) & (np.arange(T) < 150), ids, 0)
    return rows | {'segment_ids': asked, 'key_segment_ids': ids}


def cache(T, S):
    """T new tokens against a cache of S slots in no order, some never written."""
    order = np.random.default_rng(1).permutation(S).astype(np.int32)
    key_positions = np.tile(order, (B, 1))
    return {
        'positions': plain(T) + np.array([[40], [9]], np.int32),
        'segment_ids': np.ones((B, T), np.int32),
        'key_positions': key_positions,
        'key_segment_ids': (key_positions % 7 != 3).astype(np.int32),
    }


CASES = {
    'plain': lambda T: {'positions': plain(T)},
    'float_positions': lambda T: {'positions': plain(T).astype(np.float32) + 5},
    'window': lambda T: {'positions': plain(T), 'window': 45},
    'softcap': lambda T: {'positions': plain(T), 'softcap': 0.7},
    'scales': lambda T: {'positions': plain(T), 'query_scale': 1.44, 'scale': 0.21},
    'packed': packed,
    'packed_window': lambda T: packed(T) | {'window': 19},
    'many_documents': lambda T: packed(T, ([3] * 80, [5] * 7)),
    'bucket': bucket,
    'everything': lambda T: packed(T) | {'window': 33, 'softcap': 1.3, 'query_scale': 1.2},
    'cache': lambda T: cache(T, T + 90),
    'short_cache': lambda T: cache(11, 83),
}
DEFAULTS = {
    'segment_ids': None,
    'key_positions': None,
    'key_segment_ids': None,
    'frequencies': frequencies(),
    'query_scale': 1.0,
    'scale': H**-0.5,
    'window': 0,
    'softcap': 0.0,
}


def emulate(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type,
            sliding_window_length):  # fmt: skip
    """What jax documents of cuDNN's packed rows, with NaN in the rows left unwritten."""
    assert mask_type == private.MaskType.PADDING_CAUSAL
    assert q_offsets.shape[1] == q_seqlen.shape[1] + 1 > 2
    T, N = q.shape[1:3]
    at = jnp.arange(T)[None, :, None]
    starts = q_offsets[:, None, :-1]
    member = (starts >= 0) & (at >= starts) & (at < starts + q_seqlen[:, None])
    ids = jnp.sum(member * jnp.arange(1, member.shape[2] + 1)[None, None], axis=2)
    positions = jnp.tile(jnp.arange(T)[None], (len(q), 1))
    mask = reference.visible(positions, positions, ids, ids, sliding_window_length or 0)
    written = (ids > 0)[:, :, None, None]

    def dense(q, k, v, mask):
        grouped = q.reshape(*q.shape[:2], -1, N // k.shape[2], q.shape[3])
        grouped, k, v = (jnp.moveaxis(x.astype(jnp.float32), 1, -2) for x in (grouped, k, v))
        out = reference.attend_block(grouped * scale, k, v, mask, 0.0)
        return jnp.moveaxis(out, -2, 1).reshape(q.shape).astype(q.dtype)

    @jax.custom_vjp
    def kernel(q, k, v, mask, written):
        return jnp.where(written, dense(q, k, v, mask), jnp.nan)

    def backward(saved, cotangent):
        q, k, v, mask, written = saved
        gradients = jax.vjp(lambda *x: dense(*x, mask), q, k, v)[1](cotangent)
        return *(jnp.where(written, g, jnp.nan) for g in gradients), None, None

    kernel.defvjp(lambda *saved: (kernel(*saved), saved), backward)
    return kernel(q, k, v, mask, written)


EMULATED = types.SimpleNamespace(
    dot_product_attention=emulate,
    MaskType=private.MaskType,
    check_cudnn_version=lambda: gpu.PACKED_CUDNN,
)
INDEXED = {'cache', 'short_cache'}
CAPPED = {'softcap', 'everything'}
# name: (function, platform it needs, T, dtype, tolerance, cases, those of them it refuses)
IMPLEMENTATIONS = {
    'reference': (reference.attention, '', 293, 'float32', 3e-5, CASES, set()),
    'tpu': (tpu.attention, 'tpu', 293, 'bfloat16', 4e-2, CASES, set()),
    'cudnn': (gpu.attention, 'gpu', 293, 'bfloat16', 4e-2, CASES, INDEXED | CAPPED),
    'cudnn_emulated': (
        gpu.attention, '', 293, 'bfloat16', 4e-2,
        ('packed', 'packed_window', 'many_documents', 'bucket', 'everything', 'cache'),
        INDEXED | CAPPED,
    ),
}  # fmt: skip
ALL_CASES = [
    pytest.param(name, case, G, id=f'{name}-{case}-{G}')
    for name, (*_, cases, _) in IMPLEMENTATIONS.items()
    for case in cases
    for G in ([1, 3] if case == 'packed' else [3])
]


def evaluate(run, dtype, arrays, arguments):
    """(output, (dq, dk, dv)) of `run` in float64."""
    arguments = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in (DEFAULTS | arguments).items()
    }

    @jax.jit
    def value_and_gradients(q, k, v, cotangent):
        out, vjp = jax.vjp(functools.partial(run, **arguments), q, k, v)
        return out, vjp(cotangent)

    results = value_and_gradients(*(jnp.asarray(x, dtype) for x in arrays))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), results)


@pytest.mark.parametrize(('name', 'case', 'G'), ALL_CASES)
def test_matches_the_float64_oracle(name, case, G, monkeypatch):
    run, platform, T, dtype, tolerance, _, refuses = IMPLEMENTATIONS[name]
    if platform and platform != jax.default_backend():
        pytest.skip(f'needs a {platform}')
    if name == 'cudnn_emulated':
        monkeypatch.setattr(gpu, 'cudnn', EMULATED)
    arguments = CASES[case](T)
    T, S = (
        arguments.get(n, arguments['positions']).shape[1] for n in ('positions', 'key_positions')
    )
    arrays = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in inputs(T, S, G)]
    if case in refuses:
        with pytest.raises(NotImplementedError):
            evaluate(run, dtype, arrays, arguments)
        return
    expected = oracle(*arrays, frequencies=frequencies(), **arguments)[:4]
    actual = evaluate(run, dtype, arrays, arguments)
    for got, want in zip(jax.tree.leaves(actual), expected, strict=True):
        # Of the largest value, as the narrow dtypes round.
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())
    padding = arguments.get('segment_ids', np.ones(1)) == 0
    if padding.any():
        assert (actual[0][padding] == 0).all()
        assert (actual[1][0][padding] == 0).all()
    dead = arguments.get('key_segment_ids', arguments.get('segment_ids', np.ones(1))) == 0
    if dead.any():
        assert all((gradient[dead] == 0).all() for gradient in actual[1][1:])


def test_reference_in_float64_is_exact():
    arguments = CASES['everything'](293)
    arrays = [x.astype(np.float64) for x in inputs(293, 293, 3)]
    expected = oracle(*arrays, frequencies=frequencies(), **arguments)[:4]
    with jax.enable_x64(True):
        actual = evaluate(reference.attention, 'float64', arrays, arguments)
    for got, want in zip(jax.tree.leaves(actual), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_no_query_sees_the_future_or_another_document():
    run, _, T, dtype, *_ = IMPLEMENTATIONS['reference']
    rows = packed(T)
    for at in (130, 3):  # in row 0 the second document, in row 1 the second; then the first, …
        arrays = inputs(T, T, 3)
        arrays[3][:, np.arange(T) != at] = 0
        _, (dq, dk, dv) = evaluate(run, dtype, arrays, rows)
        ids, index = rows['segment_ids'], np.arange(T)
        seen = (ids == ids[:, [at]]) & (index <= at)
        assert (np.abs(dv[seen]).min(-1) > 0).all()
        assert (np.abs(dk[seen & (seen.sum(1) > 1)[:, None]]).max(-1) > 0).all()
        assert not dv[~seen].any()
        assert not dk[~seen].any()
        assert not dq[:, index != at].any()


def test_reference_memory_is_linear_in_length():
    def temporary_bytes(T):
        def loss(q, k, v, positions):
            arguments = DEFAULTS | {'positions': positions, 'segment_ids': positions}
            arguments['frequencies'] = jnp.asarray(frequencies())
            return jnp.sum(reference.attention(q, k, v, **arguments))

        shapes = [(B, T, 3 * K, H), (B, T, K, H), (B, T, K, H)]
        specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        specs.append(jax.ShapeDtypeStruct((B, T), jnp.int32))
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*specs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.3 * temporary_bytes(2048)


def test_rotation_depends_on_distance_alone():
    q, k = (jnp.asarray(x) for x in inputs(5, 5, 1)[:2])
    at = jnp.asarray([[0, 3, 7, 11, 12]] * B)
    table = jnp.asarray(frequencies())

    def logits(shift):
        return jnp.einsum(
            'btnh,bsnh->bnts', rotate(q, at + shift, table), rotate(k, at + shift, table)
        )

    np.testing.assert_allclose(logits(0), logits(1000), atol=1e-3)
    assert np.abs(np.asarray(logits(0)) - jnp.einsum('btnh,bsnh->bnts', q, k)).max() > 0.1


def test_rotation_of_integers_beyond_bfloat16():
    x = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    turned = rotate(x, jnp.asarray([[256, 257]]), jnp.ones(1))
    assert turned.dtype == jnp.float32
    angle = np.array([256.0, 257.0])
    np.testing.assert_allclose(turned[0, :, 0, 0], np.cos(angle) - np.sin(angle), atol=1e-4)


def door_arguments(T=19):
    q, k, v, _ = (jnp.asarray(x) for x in inputs(T, T, 3))
    return (q, k, v), {
        'positions': jnp.asarray(plain(T)),
        'frequencies': jnp.asarray(frequencies()),
    }


@pytest.fixture
def log(caplog):
    door.report.cache_clear()
    caplog.set_level(logging.INFO)
    return caplog


def test_auto_takes_the_reference_on_cpu_quietly(log):
    arrays, arguments = door_arguments()
    out = attention(*arrays, **arguments, platform='cpu')
    expected = oracle(*inputs(19, 19, 3), **jax.tree.map(np.asarray, arguments)).out
    np.testing.assert_allclose(out, expected, atol=3e-5)
    assert [r.levelno for r in log.records] == [logging.INFO]


@pytest.mark.parametrize(('platform', 'reason'), [('tpu', 'H=8'), ('gpu', 'float32')])
def test_auto_warns_once_where_an_accelerator_gets_the_reference(platform, reason, log):
    arrays, arguments = door_arguments()
    first, second = (attention(*arrays, **arguments, platform=platform) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    [record] = log.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()


@pytest.mark.parametrize(('name', 'platform'), [('tpu', 'tpu'), ('cudnn', 'gpu'), ('tpu', 'cpu')])
def test_a_named_implementation_never_falls_back(name, platform):
    arrays, arguments = door_arguments()
    with pytest.raises(NotImplementedError):
        attention(*arrays, **arguments, implementation=name, platform=platform)


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        ('k', lambda q, k, v, a: (q, k[:, :, :, :6], v, a)),
        ('v', lambda q, k, v, a: (q, k, v[:, :18], a)),
        ('k has K=2', lambda q, k, v, a: (q[:, :, :5], k, v, a)),
        ('q, k, v', lambda q, k, v, a: (q, k, v.astype(jnp.bfloat16), a)),
        ('q, k, v', lambda q, k, v, a: (*(x.astype(jnp.int32) for x in (q, k, v)), a)),
        ('positions', lambda q, k, v, a: (q, k, v, a | {'positions': a['positions'][:, :18]})),
        ('positions', lambda q, k, v, a: (q, k, v, a | {'positions': q[:, :, 0, 0].astype('f2')})),
        ('segment_ids', lambda q, k, v, a: (q, k, v, a | {'segment_ids': a['positions'][0]})),
        ('frequencies', lambda q, k, v, a: (q, k, v, a | {'frequencies': jnp.ones(H)})),
        ('key_positions', lambda q, k, v, a: (q, k[:, :18], v[:, :18], a)),
        ('key_segment_ids', lambda q, k, v, a: (
            q, k, v, a | {'key_positions': a['positions'], 'segment_ids': a['positions']})),
        ('window', lambda q, k, v, a: (q, k, v, a | {'window': -1})),
        ('softcap', lambda q, k, v, a: (q, k, v, a | {'softcap': -1.0})),
        ('implementation', lambda q, k, v, a: (q, k, v, a | {'implementation': 'flash'})),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name, change):
    arrays, arguments = door_arguments()
    *arrays, arguments = change(*arrays, arguments)
    # Unwrapped: under test the annotations are checked first, in the program they are not.
    with pytest.raises(ValueError, match=f'^{name}'):
        inspect.unwrap(attention)(*arrays, **arguments)


def test_jax_still_has_the_private_function():
    parameters = inspect.signature(private.dot_product_attention).parameters
    positional = ['query', 'key', 'value']
    assert list(parameters)[:3] == positional
    assert {'q_seqlen', 'kv_seqlen', 'q_offsets', 'kv_offsets', 'scale', 'mask_type',
            'sliding_window_length', 'qkv_layout'} <= set(parameters)  # fmt: skip
    assert parameters['qkv_layout'].default == 'BTNH'
    assert callable(private.check_cudnn_version)
    assert 'PADDING_CAUSAL' in private.MaskType.__members__


@pytest.mark.parametrize('G', [1, 3])
@pytest.mark.parametrize('case', ['plain', 'window', 'packed', 'packed_window', 'bucket'])
def test_cudnn_traces_without_a_gpu(case, G, monkeypatch):
    """The whole way into jax's primitives, forward and backward, up to lowering."""
    monkeypatch.setattr(private, 'check_cudnn_version', lambda: gpu.PACKED_CUDNN)
    monkeypatch.setattr(private, 'check_compute_capability', lambda _: True)
    T = 70
    arguments = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in (DEFAULTS | CASES[case](T)).items()
    }
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(T, T, G)[:3]]

    def loss(q, k, v):
        return jnp.sum(gpu.attention(q, k, v, **arguments).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
    assert [x.shape for x in traced.out_info] == [x.shape for x in arrays]
    text = str(traced.jaxpr)
    assert 'dot_product_attention_fwd_wrapper' in text
    assert 'dot_product_attention_bwd_wrapper' in text
    window = arguments['window'] or None
    assert f'sliding_window_length={window}' in text


@pytest.mark.parametrize(('installed', 'case'), [('none', 'plain'), ('9.5', 'packed')])
def test_cudnn_refuses_what_its_version_cannot(installed, case, monkeypatch):
    def version():
        if installed == 'none':
            raise RuntimeError('cuDNN is not detected.')
        return 90500

    monkeypatch.setattr(private, 'check_cudnn_version', version)
    arrays = inputs(19, 19, 3)
    with pytest.raises(NotImplementedError, match='cuDNN'):
        evaluate(gpu.attention, 'bfloat16', arrays, CASES[case](19))
