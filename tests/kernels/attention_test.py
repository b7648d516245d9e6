"""Every implementation of attention against one float64 oracle, forward and gradients."""

import inspect
import logging
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as private
from packed_rows import packed_rows

from helios_jax import config
from helios_jax.arch.attention import choose
from helios_jax.errors import UserError
from helios_jax.kernels import attention as door
from helios_jax.kernels.attention import IMPLEMENTATIONS, Setting, Tokens, attention, gpu, reference
from helios_jax.kernels.attention.rotation import rotate
from helios_jax.verify.oracle import oracle

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, K = 2, 2
H = 8 if jax.default_backend() == 'cpu' else 64  # accelerators' kernels want some width


def inputs(T, S, G, seed=0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, K * G, H), (B, S, K, H), (B, S, K, H), (B, T, K * G, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def frequencies():
    return (100.0 ** (-np.arange(H // 2) / (H // 2))).astype(np.float32)


def setting(**options):
    return Setting(frequencies(), **options)


def packed(T, lengths=((97, 41, 23), (2, 131))):
    """Rows of documents, then padding; positions restart with each document."""
    return Tokens(*packed_rows(lengths, T))


def plain(T):
    return Tokens(np.tile(np.arange(T, dtype=np.int32), (B, 1)))


def floats(T):
    return Tokens(plain(T).positions.astype(np.float32) + 5)


def bucket(T):
    """Self-attention in which only some queries are asked for, none of them late in the row."""
    positions, ids, *_ = packed(T)
    asked = np.where((positions % 3 == 1) & (np.arange(T) < 150), ids, 0)
    return Tokens(positions, asked, key_segment_ids=ids)


def cache(T, S):
    """T new tokens against a cache of S slots in no order, some never written."""
    order = np.random.default_rng(1).permutation(S).astype(np.int32)
    slots = np.tile(order, (B, 1))
    positions = plain(T).positions + np.array([[40], [9]], np.int32)
    return Tokens(positions, np.ones((B, T), np.int32), slots, (slots % 7 != 3).astype(np.int32))


CASES = {
    'plain': lambda T: (plain(T), setting()),
    'float_positions': lambda T: (floats(T), setting()),
    'window': lambda T: (plain(T), setting(window=45)),
    'softcap': lambda T: (plain(T), setting(softcap=0.7)),
    'scales': lambda T: (plain(T), setting(query_scale=1.44, scale=0.21)),
    'packed': lambda T: (packed(T), setting()),
    'packed_window': lambda T: (packed(T), setting(window=19)),
    'many_documents': lambda T: (packed(T, ([3] * 80, [5] * 7)), setting()),
    'bucket': lambda T: (bucket(T), setting()),
    'everything': lambda T: (packed(T), setting(window=33, softcap=1.3, query_scale=1.2)),
    'cache': lambda T: (cache(T, T + 90), setting()),
    'unsegmented_cache': lambda T: (cache(T, 83)._replace(segment_ids=None, key_segment_ids=None),
                                    setting()),
    'short_cache': lambda T: (cache(11, 83), setting()),
}  # fmt: skip


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
        logits = reference.score_block(grouped * scale, k, mask, 0.0)
        out, _ = reference.softmax_block(logits, v)
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
INDEXED = {'cache', 'short_cache', 'unsegmented_cache'}
CAPPED = {'softcap', 'everything'}
# name: (row of the table, platform that it is tested on, T, dtype, tolerance, cases it refuses)
IMPLEMENTED = {
    'reference': ('reference', '', 293, 'float32', 3e-5, set()),
    'tpu': ('tpu', 'tpu', 293, 'bfloat16', 4e-2, set()),
    'cudnn': ('cudnn', 'gpu', 293, 'bfloat16', 4e-2, INDEXED | CAPPED),
    'cudnn_emulated': ('cudnn', '', 293, 'bfloat16', 4e-2, INDEXED | CAPPED),
}
EMULATES = ('packed', 'packed_window', 'many_documents', 'bucket', 'everything', 'cache')
# The quick tier has these together, in 'everything'.
SLOW = ('window', 'softcap', 'scales', 'packed_window')
ALL_CASES = [
    pytest.param(
        name, case, G, id=f'{name}-{case}-{G}', marks=[pytest.mark.slow] if case in SLOW else []
    )
    for name in IMPLEMENTED
    for case in (EMULATES if name == 'cudnn_emulated' else CASES)
    for G in ([1, 3] if case == 'packed' else [3])
]


def test_every_implementation_is_tested_and_can_be_asked_for():
    assert tuple(IMPLEMENTATIONS) == config.model.ATTENTION
    assert {row for row, *_ in IMPLEMENTED.values()} == set(IMPLEMENTATIONS)


def evaluate(run, dtype, arrays, tokens, setting):
    """(output, (dq, dk, dv)) of `run` in float64."""
    tokens, turns = jax.tree.map(jnp.asarray, (tokens, setting.frequencies))
    setting = setting._replace(frequencies=turns)

    @jax.jit
    def value_and_gradients(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda q, k, v: run(q, k, v, tokens, setting), q, k, v)
        return out, vjp(cotangent)

    results = value_and_gradients(*(jnp.asarray(x, dtype) for x in arrays))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), results)


@pytest.mark.parametrize(('name', 'case', 'G'), ALL_CASES)
def test_matches_the_float64_oracle(name, case, G, monkeypatch):
    row, platform, T, dtype, tolerance, refuses = IMPLEMENTED[name]
    run = IMPLEMENTATIONS[row].attention
    assert IMPLEMENTATIONS[row].differentiable, 'a row without gradients needs a test of its own'
    if platform and platform != jax.default_backend():
        pytest.skip(f'needs a {platform}')
    if name == 'cudnn_emulated':
        monkeypatch.setattr(gpu, 'cudnn', EMULATED)
    tokens, setting = CASES[case](T)
    T, S = tokens.positions.shape[1], tokens.positions_of_keys.shape[1]
    arrays = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in inputs(T, S, G)]
    if case in refuses:
        with pytest.raises(NotImplementedError):
            evaluate(run, dtype, arrays, tokens, setting)
        return
    expected = oracle(*arrays, tokens, setting)[:4]
    actual = evaluate(run, dtype, arrays, tokens, setting)
    for got, want in zip(jax.tree.leaves(actual), expected, strict=True):
        # Of the largest value, as the narrow dtypes round.
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())
    padding = np.asarray(tokens.ids_of_queries) == 0
    assert (actual[0][padding] == 0).all()
    assert (actual[1][0][padding] == 0).all()
    dead = np.asarray(tokens.ids_of_keys) == 0
    assert all((gradient[dead] == 0).all() for gradient in actual[1][1:])


@pytest.mark.parametrize(
    'case',
    ['bucket', *(pytest.param(c, marks=pytest.mark.slow) for c in ('packed', 'packed_window'))],
)
def test_few_documents_take_one_call_that_masks_nothing(case, monkeypatch):
    monkeypatch.setattr(gpu, 'cudnn', EMULATED)
    tokens, setting = CASES[case](T := 293)
    arrays = [np.asarray(jnp.asarray(x, 'bfloat16'), np.float64) for x in inputs(T, T, 3)]
    few = setting._replace(few_documents=True)
    results = [evaluate(gpu.attention, 'bfloat16', arrays, tokens, s) for s in (setting, few)]
    for any_number, promised in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(promised, any_number)


def test_a_promise_of_few_documents_that_is_broken_gives_nan(monkeypatch):
    monkeypatch.setattr(gpu, 'cudnn', EMULATED)
    tokens, setting = CASES['many_documents'](T := 293)
    few = setting._replace(few_documents=True)
    out, _ = evaluate(gpu.attention, 'bfloat16', inputs(T, T, 3), tokens, few)
    assert np.isnan(out[np.asarray(tokens.ids_of_queries) != 0]).all()


def test_reference_in_float64_is_exact():
    tokens, setting = CASES['everything'](293)
    arrays = [x.astype(np.float64) for x in inputs(293, 293, 3)]
    expected = oracle(*arrays, tokens, setting)[:4]
    with jax.enable_x64(True):
        actual = evaluate(reference.attention, 'float64', arrays, tokens, setting)
    for got, want in zip(jax.tree.leaves(actual), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_no_query_of_the_reference_sees_the_future_or_another_document():
    T = 293
    rows = packed(T)
    for at in (130, 3):  # in row 0 the second document, in row 1 the second; then the first, …
        arrays = inputs(T, T, 3)
        arrays[3][:, np.arange(T) != at] = 0
        _, (dq, dk, dv) = evaluate(reference.attention, 'float32', arrays, rows, setting())
        ids, index = rows.segment_ids, np.arange(T)
        seen = (ids == ids[:, [at]]) & (index <= at)
        assert (np.abs(dv[seen]).min(-1) > 0).all()
        assert (np.abs(dk[seen & (seen.sum(1) > 1)[:, None]]).max(-1) > 0).all()
        assert not dv[~seen].any()
        assert not dk[~seen].any()
        assert not dq[:, index != at].any()


def test_reference_memory_is_linear_in_length():
    def temporary_bytes(T):
        def loss(q, k, v, positions):
            own = Setting(jnp.asarray(frequencies()))
            return jnp.sum(reference.attention(q, k, v, Tokens(positions, positions), own))

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


def test_what_tokens_leave_out_has_one_meaning():
    positions, ids = jnp.asarray([[0, 1, 0]]), jnp.asarray([[1, 1, 2]])
    slots, owners = jnp.asarray([[4, 0]]), jnp.asarray([[2, 0]])

    def facts(tokens):
        return tokens.own_keys, tokens.plain, tokens.queries_masked

    def complete(tokens):
        arrays = tokens.positions_of_keys, tokens.ids_of_queries, tokens.ids_of_keys
        return [x.tolist() for x in arrays]

    assert facts(Tokens(positions)) == (True, True, False)
    assert complete(Tokens(positions)) == [[[0, 1, 0]], [[1, 1, 1]], [[1, 1, 1]]]
    assert facts(Tokens(positions, ids)) == (True, False, False)
    assert complete(Tokens(positions, ids)) == [[[0, 1, 0]], [[1, 1, 2]], [[1, 1, 2]]]
    masked = Tokens(positions, ids * 0, key_segment_ids=ids)
    assert facts(masked) == (True, False, True)
    assert complete(masked) == [[[0, 1, 0]], [[0, 0, 0]], [[1, 1, 2]]]
    assert facts(Tokens(positions, key_positions=slots)) == (False, False, False)
    assert complete(Tokens(positions, key_positions=slots)) == [[[4, 0]], [[1, 1, 1]], [[1, 1]]]
    assert complete(Tokens(positions, ids, slots, owners)) == [[[4, 0]], [[1, 1, 2]], [[2, 0]]]


def test_a_setting_is_two_arrays_and_what_is_static():
    given = Setting(jnp.ones(3), 1.5, window=4, softcap=2.0)
    assert len(jax.tree.leaves(given)) == 2
    assert given.logit_scale == 1 / math.sqrt(6)
    assert given._replace(scale=0.3).logit_scale == 0.3
    seen = []
    jax.jit(lambda setting: seen.append(setting))(given)
    assert seen[0][2:] == given[2:]
    assert isinstance(seen[0].query_scale, jax.core.Tracer)


def door_arguments(T=19):
    q, k, v, _ = (jnp.asarray(x) for x in inputs(T, T, 3))
    tokens, setting = jax.tree.map(jnp.asarray, (plain(T), Setting(frequencies())))
    return (q, k, v), tokens, setting


@pytest.fixture
def log(caplog):
    door.log_choice.cache_clear()
    caplog.set_level(logging.INFO)
    return caplog


def test_auto_takes_the_reference_on_cpu_quietly(log):
    arrays, tokens, setting = door_arguments()
    out = attention(*arrays, tokens, setting, platform='cpu')
    expected = oracle(*inputs(19, 19, 3), *jax.tree.map(np.asarray, (tokens, setting))).out
    np.testing.assert_allclose(out, expected, atol=3e-5)
    assert [r.levelno for r in log.records] == [logging.INFO]


@pytest.mark.parametrize(
    ('platform', 'reason'), [('tpu', 'tpu cannot take H=8'), ('gpu', 'cudnn cannot take float32')]
)
def test_auto_warns_once_where_an_accelerator_gets_the_reference(platform, reason, log):
    arrays, tokens, setting = door_arguments()
    first, second = (attention(*arrays, tokens, setting, platform=platform) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    [record] = log.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()


@pytest.mark.parametrize(
    ('name', 'platform', 'reason'),
    [
        (
            'tpu',
            'tpu',
            'tpu .* cannot take H=8: it must be a multiple of 32; .* auto',
        ),
        (
            'cudnn',
            'gpu',
            'cudnn .* cannot take float32: only bfloat16, float16; .* auto',
        ),
        ('tpu', 'cpu', r"model\.attention=tpu .* needs platform 'tpu', not 'cpu'; .* auto"),
    ],
)
def test_a_named_implementation_never_falls_back_and_says_why(name, platform, reason):
    arrays, tokens, setting = door_arguments()
    with pytest.raises(door.RefusedError, match=reason):
        attention(*arrays, tokens, setting, implementation=name, platform=platform)


@pytest.mark.parametrize('platform', ['tpu', 'gpu', 'cpu'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize(
    ('H', 'softcap', 'ring'), [(64, 0.0, 0), (40, 0.0, 0), (64, 3.0, 0), (64, 0.0, 1)]
)
def test_a_config_tells_what_the_door_takes(platform, dtype, H, softcap, ring):
    for name in ('auto', *IMPLEMENTATIONS):
        model = config.Model(
            head_dim=H, compute_dtype=dtype, attention_softcap=softcap, attention=name
        )
        how = {'softcap': softcap > 0, 'blockwise': ring > 0}
        q = jnp.zeros((1, 2, 3, H), dtype)
        try:
            expected = door.first_able(lambda found: found, q, name, platform, **how)
        except door.RefusedError as error:
            with pytest.raises(UserError, match=re.escape(str(error))):
                choose(model, platform, ring=ring > 0)
        else:
            assert IMPLEMENTATIONS[choose(model, platform, ring=ring > 0)] is expected


@pytest.mark.parametrize(
    ('implementation', 'platform', 'found', 'level'),
    [
        ('auto', 'cpu', 'reference', logging.INFO),
        ('auto', 'tpu', 'tpu', logging.INFO),
        ('auto', 'gpu', 'reference', logging.WARNING),
        ('reference', 'tpu', 'reference', None),
    ],
)
def test_blockwise_takes_what_can_attend_to_some_of_the_keys(
    implementation, platform, found, level, log
):
    q = jnp.zeros((1, 2, 3, 32), jnp.bfloat16)
    assert door.blockwise(q, implementation, platform) == IMPLEMENTATIONS[found].blockwise
    assert [r.levelno for r in log.records] == ([] if level is None else [level])


def test_a_machine_that_a_kernel_does_not_know_gets_the_reference(monkeypatch, log):
    def unknown():
        raise NotImplementedError('does not know TPU v99.')

    row = IMPLEMENTATIONS['tpu']._replace(ready=unknown)
    monkeypatch.setitem(IMPLEMENTATIONS, 'tpu', row)
    q = jnp.zeros((1, 2, 3, 32), jnp.bfloat16)
    found = door.blockwise(q, 'auto', 'tpu')
    assert found == IMPLEMENTATIONS['reference'].blockwise
    [record] = log.records
    assert 'tpu does not know TPU v99' in record.getMessage()


def test_blockwise_refuses_what_cannot():
    with pytest.raises(NotImplementedError, match=r'cudnn .* cannot attend to some'):
        door.blockwise(jnp.zeros((1, 2, 3, 32), jnp.bfloat16), 'cudnn', 'gpu')


def change(**fields):
    """The door's arguments with other tokens or another setting."""

    def apply(arrays, tokens, setting):
        made = {name: f(tokens) for name, f in fields.items()}
        own = {name: x for name, x in made.items() if name in Tokens._fields}
        rest = {name: x for name, x in made.items() if name not in own}
        return arrays, tokens._replace(**own), setting._replace(**rest)

    return apply


def arrays(f):
    return lambda arrays, tokens, setting: (f(*arrays), tokens, setting)


BAD = [
    ('k', arrays(lambda q, k, v: (q, k[:, :, :, :6], v))),
    ('v', arrays(lambda q, k, v: (q, k, v[:, :18]))),
    ('k has K=2', arrays(lambda q, k, v: (q[:, :, :5], k, v))),
    ('q, k, v', arrays(lambda q, k, v: (q, k, v.astype(jnp.bfloat16)))),
    ('q, k, v', arrays(lambda *x: [a.astype(jnp.int32) for a in x])),
    ('key_positions', arrays(lambda q, k, v: (q, k[:, :18], v[:, :18]))),
    ('positions', change(positions=lambda t: t.positions[:, :18])),
    ('positions', change(positions=lambda t: t.positions.astype(jnp.float16))),
    ('segment_ids', change(segment_ids=lambda t: t.positions[0])),
    ('key_segment_ids', change(key_positions=lambda t: t.positions,
                               segment_ids=lambda t: t.positions)),
    ('segment_ids', change(key_segment_ids=lambda t: t.positions)),
    ('frequencies', change(frequencies=lambda _: jnp.ones(H))),
    ('query_scale', change(query_scale=lambda _: jnp.ones(3))),
    ('window', change(window=lambda _: -1)),
    ('softcap', change(softcap=lambda _: -1.0)),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'spoil'), BAD)
def test_bad_arguments_are_named(name, spoil):
    arrays, tokens, setting = spoil(*door_arguments())
    # Unwrapped: under test the annotations are checked first, in the program they are not.
    with pytest.raises(ValueError, match=f'^{name}'):
        inspect.unwrap(attention)(*arrays, tokens, setting)


@pytest.mark.parametrize('name', ['implementation', 'residuals'])
def test_bad_names_are_refused(name):
    arrays, tokens, setting = door_arguments()
    with pytest.raises(ValueError, match=f"^{name}='flash'"):
        attention(*arrays, tokens, setting, **{name: 'flash'})


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
@pytest.mark.parametrize('few', [True, False])
@pytest.mark.parametrize('case', ['plain', 'window', 'packed', 'packed_window', 'bucket'])
def test_cudnn_traces_without_a_gpu(case, few, G, monkeypatch):
    """The whole way into jax's primitives, forward and backward, up to lowering."""
    monkeypatch.setattr(private, 'check_cudnn_version', lambda: gpu.PACKED_CUDNN)
    monkeypatch.setattr(private, 'check_compute_capability', lambda _: True)
    T = 70
    tokens, setting = jax.tree.map(jnp.asarray, CASES[case](T))
    setting = setting._replace(few_documents=few)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(T, T, G)[:3]]

    def loss(q, k, v):
        return jnp.sum(gpu.attention(q, k, v, tokens, setting).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
    assert [x.shape for x in traced.out_info] == [x.shape for x in arrays]
    text = str(traced.jaxpr)
    assert 'dot_product_attention_fwd_wrapper' in text
    assert 'dot_product_attention_bwd_wrapper' in text
    window = setting.window or None
    assert f'sliding_window_length={window}' in text
    # A decision on the data is a wait for the GPU.
    assert ('cond[' in text) == (case in ('packed', 'packed_window', 'bucket') and not few)


@pytest.mark.parametrize(('installed', 'case'), [('none', 'plain'), ('9.5', 'packed')])
def test_cudnn_refuses_what_its_version_cannot(installed, case, monkeypatch):
    def version():
        if installed == 'none':
            raise RuntimeError('cuDNN is not detected.')
        return 90500

    monkeypatch.setattr(private, 'check_cudnn_version', version)
    arrays = inputs(19, 19, 3)
    with pytest.raises(NotImplementedError, match='cuDNN'):
        evaluate(gpu.attention, 'bfloat16', arrays, *CASES[case](19))
