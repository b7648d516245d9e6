"""The attention sublayer against a float64 loop over its queries, whole and split over a mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import config
from helios_jax.errors import UserError
from helios_jax.model import rope
from helios_jax.model.attention import Attention
from helios_jax.parallel import mesh as meshes

B, T, D, N, K, H = 4, 24, 20, 6, 2, 8
YARN = config.Rope(base=100.0, trained_length=3, scaling='dynamic')
MODEL = config.Model(
    vocab_size=5,
    embed_dim=D,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    norm_eps=1e-3,
    rope=config.Rope(base=100.0, trained_length=3),
)
CASES = {
    'plain': {},
    'multi_query': {'num_kv_heads': 1},
    'multi_head': {'num_kv_heads': N},
    'norms': {'qk_norm': True},
    'softcap': {'attention_softcap': 0.3},
    'window': {'window': 5},
    'static_yarn': {'rope': dataclasses.replace(YARN, scaling='static', factor=4.0)},
    'dynamic_yarn': {'rope': YARN},
    'biases': {'qkv_bias': True},
    'linear': {'rope': dataclasses.replace(YARN, scaling='linear', factor=4.0)},
    'ntk': {'rope': dataclasses.replace(YARN, scaling='ntk', factor=3.0)},
    'everything': {'rope': YARN, 'qk_norm': True, 'attention_softcap': 0.5, 'window': 13},
}  # fmt: skip


def rows(packed):
    """Positions and segment ids: one document a row, or several and padding."""
    lengths = [[3, 1, 14], [20], [9, 15], [1, 2, 13, 5]] if packed else [[T]] * B
    positions, segment_ids = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for document, length in enumerate(documents, start=1):
            positions[row, start : start + length] = np.arange(length)
            segment_ids[row, start : start + length] = document
            start += length
    return positions, segment_ids


def stream():
    return np.random.default_rng(5).normal(size=(B, T, D)).astype(np.float32)


def direct(model, window, params, x, positions, segment_ids):
    """One query after another; each rotates all its keys with its own table."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    q = np.einsum('btd,dnh->btnh', x.astype(np.float64), p['q']['w'])
    k = np.einsum('btd,dkh->btkh', x.astype(np.float64), p['k']['w'])
    v = np.einsum('btd,dkh->btkh', x.astype(np.float64), p['v']['w'])
    if model.qkv_bias:
        q, k, v = q + p['q_bias'], k + p['k_bias'], v + p['v_bias']
    if model.qk_norm:
        norm = lambda a: a / np.sqrt((a**2).mean(-1, keepdims=True) + model.norm_eps)
        q, k = norm(q) * p['q_norm']['scale'], norm(k) * p['k_norm']['scale']

    def turn(a, at, table):
        pair = (a[..., : H // 2] + 1j * a[..., H // 2 :]) * np.exp(
            1j * np.multiply.outer(at, table)
        )
        return np.concatenate([pair.real, pair.imag], axis=-1)

    out = np.zeros_like(q)
    for b, t in np.argwhere(segment_ids > 0):
        at = positions[b, t]
        scale = {
            'none': 1.0,
            'static': model.rope.factor,
            'linear': model.rope.factor,
        }.get(model.rope.scaling)
        if model.rope.grows:
            scale = 2.0 ** math.ceil(math.log2(max(1, (at + 1) / model.rope.trained_length)))
        table = rope.frequencies(model.rope, H, scale)
        seen = (segment_ids[b] == segment_ids[b, t]) & (positions[b] <= at)
        if window:
            seen &= positions[b] > at - window
        for n in range(N):
            group = n // (N // model.num_kv_heads)
            keys = turn(k[b, seen, group], positions[b, seen], table)
            logits = keys @ turn(q[b, t, n], at, table) / math.sqrt(H)
            if model.rope.scaling in ('static', 'dynamic'):
                logits = logits * (0.1 * math.log(scale) + 1) ** 2
            if model.attention_softcap:
                logits = model.attention_softcap * np.tanh(logits / model.attention_softcap)
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights / weights.sum() @ v[b, seen, group]
    return np.einsum('btnh,nhd->btd', out, p['out']['w'])


def build(case, random_variables):
    model = dataclasses.replace(MODEL, **CASES[case])
    module = Attention(model, model.window)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 2, D), jnp.float32)
    variables = random_variables(module, x, tokens, tokens)
    # Larger logits, so that where a query looks matters.
    for name in ('q', 'k'):
        variables['params'][name]['w'] *= 2
    return module, variables


@pytest.mark.slow
def test_the_first_layers_values_are_mixed_in(random_variables):
    model = dataclasses.replace(MODEL, value_residual=True)
    module, x = Attention(model), jnp.asarray(stream())
    args = tuple(map(jnp.asarray, rows(packed=True)))
    variables = random_variables(module, x, *args)
    params = variables['params']
    own, first = np.float64(params['value_mix'])
    others = np.random.default_rng(8).normal(size=params['v']['w'].shape).astype(np.float32)
    values = jnp.einsum('btd,dkh->btkh', x, others)
    out = module.apply(variables, x, *args, 0, values)
    mixed = {'w': own * params['v']['w'] + first * others}
    plain = {'q': params['q'], 'k': params['k'], 'v': mixed, 'out': params['out']}
    expected = Attention(MODEL).apply({'params': plain}, x, *args)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(
        module.init(jax.random.key(0), x, *args)['params']['value_mix'].value, [0.5, 0.5]
    )


@pytest.mark.parametrize(
    ('case', 'packed'),
    [*((case, True) for case in CASES), ('plain', False), ('dynamic_yarn', False)],
)
def test_equals_a_loop_over_queries(case, packed, random_variables):
    module, variables = build(case, random_variables)
    positions, segment_ids = rows(packed)
    ids = jnp.asarray(segment_ids) if packed else None
    out = jax.jit(module.apply)(variables, jnp.asarray(stream()), jnp.asarray(positions), ids)
    expected = direct(
        module.model, module.window, variables['params'], stream(), positions, segment_ids
    )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
    assert not np.asarray(out)[segment_ids == 0].any()


@pytest.mark.parametrize('case', ['plain', 'window', 'dynamic_yarn'])
def test_a_query_depends_on_what_it_sees_and_on_nothing_else(case, random_variables):
    module, variables = build(case, random_variables)
    positions, ids = rows(packed=True)
    run = lambda x: module.apply(variables, x, jnp.asarray(positions), jnp.asarray(ids))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def gradient(x, t):
        """The slope of what the queries at index t of every row give."""
        weight = (jnp.arange(T) == t)[None, :, None]
        return jax.grad(lambda x: jnp.sum(jnp.where(weight, run(x) ** 2, 0)))(x)

    asked = np.array([0, 2, 3, 7, 17, 18, 23])
    gradients = np.asarray(gradient(jnp.asarray(stream()), asked))
    for t, of_row in zip(asked, gradients, strict=True):
        seen = (ids == ids[:, [t]]) & (ids > 0) & (np.arange(T) <= t)
        if module.window:
            seen &= np.arange(T) > t - module.window
        np.testing.assert_array_equal(np.abs(of_row).max(-1) > 0, seen)


@pytest.mark.parametrize(
    'chunks',
    [(T,), pytest.param((1, 7, 16), marks=pytest.mark.slow), (5, 1, 1, 1, 11, 5)],
    ids=str,
)
@pytest.mark.parametrize('case', ['norms', pytest.param('dynamic_yarn', marks=pytest.mark.slow)])
def test_the_cache_changes_nothing(case, chunks, random_variables):
    """Chunks of any size cross the boundaries of dynamic YaRN; the cache is longer than the row."""
    module, variables = build(case, random_variables)
    positions, ids = rows(packed=False)
    x, cache, written = stream(), {}, []
    extend = jax.jit(
        functools.partial(module.apply, mutable=['cache']), static_argnames='cache_length'
    )
    for start in np.cumsum((0, *chunks))[:-1]:
        part = slice(start, start + chunks[len(written)])
        piece, cache = extend(
            variables | cache,
            *(jnp.asarray(a[:, part]) for a in (x, positions, ids)),
            cache_length=29,
        )
        written.append(piece)
    expected = direct(module.model, 0, variables['params'], x, positions, ids)
    np.testing.assert_allclose(np.concatenate(written, axis=1), expected, rtol=0, atol=2e-5)


MESHES = [
    {'tensor': 2, 'fsdp': 4},
    {'context': 4, 'tensor': 2},
    {'context': 2, 'data': 2, 'expert': 2},
]


@pytest.fixture(params=['plain', 'everything'])
def whole(request, random_variables):
    """A function, its arguments and what it gives on one device."""
    case = 'everything' if request.param == 'everything' else 'plain'
    module, variables = build(case, random_variables)
    positions, ids = rows(packed=request.param != 'plain')
    ids = jnp.asarray(ids) if request.param != 'plain' else None
    weight = jnp.asarray(np.random.default_rng(6).normal(size=(B, T, D)), jnp.float32)

    def value_and_gradients(variables, x, positions, ids):
        run = lambda variables, x: module.apply(variables, x, positions, ids)
        out, vjp = jax.vjp(run, variables, x)
        return out, vjp(weight)

    arguments = variables, jnp.asarray(stream()), jnp.asarray(positions), ids
    return value_and_gradients, arguments, jax.jit(value_and_gradients)(*arguments)


@pytest.mark.parametrize('name', [pytest.param('tpu', marks=pytest.mark.slow), 'cudnn'])
def test_with_a_cache_the_machine_chooses_whatever_is_named_for_training(name, random_variables):
    """Or a run would fail at its last line, a sample, where the kernel takes no cache."""
    made = []
    for implementation in ('reference', name):
        module = Attention(dataclasses.replace(MODEL, attention=implementation))
        positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
        x = jnp.asarray(stream())
        variables = random_variables(module, x, positions, None)
        out, _ = module.apply(variables, x, positions, None, T, mutable=['cache'])
        made.append(out)
    np.testing.assert_array_equal(*made)
    with pytest.raises(UserError, match=f'model.attention={name} cannot be used'):
        module.apply(variables, x, positions, None)


@pytest.mark.slow
def test_split_over_a_mesh_equals_one_device(whole):
    run, arguments, expected = whole
    for sizes in MESHES:
        mesh = meshes.make(config.Mesh(**({'fsdp': 1} | sizes)))
        with jax.set_mesh(mesh):
            actual = jax.jit(lambda *arguments: run(*arguments))(*arguments)
        jax.tree.map(
            lambda a, e, sizes=sizes: np.testing.assert_allclose(
                a, e, rtol=1e-5, atol=3e-5, err_msg=str(sizes)
            ),
            actual,
            expected,
        )


@pytest.mark.parametrize(
    ('platform', 'case', 'number'), [('tpu', 'norms', 4), ('tpu', 'plain', 0), ('cpu', 'norms', 0)]
)
def test_a_tpu_normalises_heads_as_its_kernel_reads_them(platform, case, number, random_variables):
    """q and k before their norm and behind it: else XLA transposes both, and back."""
    module, variables = build(case, random_variables)
    module = module.clone(
        model=dataclasses.replace(module.model, attention='reference'), platform=platform
    )
    positions, segment_ids = map(jnp.asarray, rows(packed=True))
    jaxpr = jax.make_jaxpr(module.apply)(variables, jnp.asarray(stream()), positions, segment_ids)
    assert str(jaxpr).count('layout_constraint[') == number
