"""Ring attention over simulated devices against the reference on one, and its compiled schedule."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from packed_rows import packed_rows

from helios_jax import config
from helios_jax.kernels.attention import Blockwise, Setting, Tokens, reference
from helios_jax.parallel import context
from helios_jax.parallel import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, T, N, K, H = 4, 72, 6, 2, 14
KERNEL = Blockwise(reference.forward, reference.backward)
ROWS = PartitionSpec('data', 'context')
# Documents that span devices and short ones, then padding.
LENGTHS = [[50, 3, 10], [72], [1, 1, 2, 30, 31], [20, 25]]


def inputs(length=T, dtype='float32'):
    """q, k, v and a cotangent of the output, the same numbers in every dtype."""
    rng = np.random.default_rng(0)
    shapes = [(B, length, heads, H) for heads in (N, K, K, N)]
    return [jnp.asarray(rng.normal(size=shape), 'bfloat16').astype(dtype) for shape in shapes]


def packed():
    return Tokens(*packed_rows(LENGTHS, T))


def plain(length=T):
    return Tokens(np.tile(np.arange(length, dtype=np.int32), (B, 1)))


def bucket():
    """Only some of the queries are asked for, all keys are there."""
    positions, ids, *_ = packed()
    return Tokens(positions, np.where(positions % 3 == 1, ids, 0), key_segment_ids=ids)


def setting(**options):
    frequencies = jnp.asarray(100.0 ** (-np.arange(H // 2) / (H // 2)), jnp.float32)
    return Setting(frequencies, **options)


CASES = {
    'plain': (plain(), {}),
    'float_positions': (Tokens(plain().positions.astype(np.float32) + 0.5), {}),
    'packed_window': (packed(), {'window': 11}),
    'bucket': (bucket(), {}),
    'everything': (packed(), {'window': 29, 'softcap': 1.3, 'query_scale': 1.44}),
}


def in_a_ring(q, k, v, tokens, setting, *, kernel=KERNEL):
    """Ring attention on the mesh that is set."""
    return jax.shard_map(
        functools.partial(context.ring_attention, kernel),
        in_specs=(ROWS, ROWS, ROWS, ROWS, PartitionSpec()),
        out_specs=ROWS,
        check_vma=False,
    )(q, k, v, tokens, setting)


def unzigzag(x, num_shards, axis=1):
    """The inverse of `zigzag`."""
    order = context.zigzag(jnp.arange(x.shape[axis]), num_shards, axis=0)
    return jnp.take(x, jnp.argsort(order), axis)


def balanced_ring(num_shards, q, k, v, tokens, setting):
    """`in_a_ring` of rows in zigzag order, its result in the order of the arguments."""
    q, k, v, tokens = jax.tree.map(lambda x: context.zigzag(x, num_shards), (q, k, v, tokens))
    return unzigzag(in_a_ring(q, k, v, tokens, setting), num_shards)


def value_and_gradients(run, case, dtype='float32'):
    tokens, options = jax.tree.map(jnp.asarray, case[0]), setting(**case[1])

    @jax.jit
    def evaluate(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda q, k, v: run(q, k, v, tokens, options), q, k, v)
        return out, vjp(cotangent)

    return jax.device_get(evaluate(*inputs(tokens.positions.shape[1], dtype)))


def make_mesh(num_shards):
    sizes = config.Mesh(data=2, fsdp=1, context=num_shards)
    return meshes.make(sizes, jax.devices()[: 2 * num_shards])


def assert_same(actual, expected):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'num_shards'), [*((case, 4) for case in CASES), ('everything', 2)]
)
def test_the_ring_gives_what_one_device_gives(case, num_shards):
    with jax.set_mesh(make_mesh(num_shards)):
        run = functools.partial(balanced_ring, num_shards)
        actual = value_and_gradients(run, CASES[case])
    assert_same(actual, value_and_gradients(reference.attention, CASES[case]))
    padding = np.asarray(CASES[case][0].ids_of_queries) == 0
    assert not actual[0][padding].any()
    assert not actual[1][0][padding].any()


@pytest.mark.slow
@pytest.mark.parametrize('num_shards', [1, 2])
def test_any_arrangement_of_rows_will_do(num_shards):
    with jax.set_mesh(make_mesh(num_shards)):
        actual = value_and_gradients(in_a_ring, CASES['packed_window'])
    assert_same(actual, value_and_gradients(reference.attention, CASES['packed_window']))


@pytest.mark.slow
def test_in_bfloat16_the_ring_at_most_doubles_the_error_of_rounding():
    expected = value_and_gradients(reference.attention, CASES['bucket'])
    rounded = value_and_gradients(reference.attention, CASES['bucket'], 'bfloat16')
    with jax.set_mesh(make_mesh(4)):
        run = functools.partial(balanced_ring, 4)
        actual = value_and_gradients(run, CASES['bucket'], 'bfloat16')
    for got, one, want in zip(*map(jax.tree.leaves, (actual, rounded, expected)), strict=True):
        assert got.dtype == jnp.bfloat16
        errors = [np.linalg.norm(x.astype(np.float32) - want) for x in (got, one)]
        assert errors[0] < 2 * errors[1]


@pytest.mark.slow
def test_blocks_of_the_keys_add_up():
    """The kernel's contract, over more queries than one block of the reference."""
    length, cut = 300, 130
    q, k, v, cotangent = inputs(length)
    rng = np.random.default_rng(1)
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (B, length)), axis=1), jnp.int32)
    positions = jnp.asarray(plain(length).positions)
    options = setting(softcap=1.1, window=200)

    def block(a, b):
        tokens = Tokens(positions, ids, positions[:, a:b], ids[:, a:b])
        return (q, k[:, a:b], v[:, a:b]), (tokens, options)

    @functools.partial(jax.jit, static_argnums=0)
    def merged(cuts):
        blocks = [block(a, b) for a, b in itertools.pairwise(cuts)]
        results = [reference.forward(*arrays, *given) for arrays, given in blocks]
        results = [(out.swapaxes(1, 2), lse) for out, lse in results]
        out, lse = functools.reduce(lambda x, y: context.merge(*x, *y), results)
        out = out.swapaxes(1, 2)
        gradients = [
            reference.backward(*arrays, out, lse, cotangent, *given) for arrays, given in blocks
        ]
        dq, dk, dv = zip(*gradients, strict=True)
        return out, sum(dq), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1), lse

    @jax.jit
    def whole():
        arrays, given = block(0, length)
        out, vjp = jax.vjp(lambda *arrays: reference.attention(*arrays, *given), *arrays)
        return out, *vjp(cotangent)

    expected = whole()
    *one_block, lse = merged((0, length))
    *two_blocks, merged_lse = merged((0, cut, length))
    assert_same(one_block, expected)
    assert_same(two_blocks, expected)
    np.testing.assert_allclose(merged_lse, lse, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.isneginf(lse), np.repeat(ids[:, None] == 0, N, axis=1))


@pytest.mark.parametrize(('saved', 'turns'), [([], 2), (['attention_output', 'log_sum_exp'], 1)])
def test_saving_the_residuals_spares_the_second_forward_turn(saved, turns):
    """Counted in keys sent, of which each turn of the ring sends C − 1 blocks."""
    num_shards = 4
    tokens = jax.tree.map(jnp.asarray, plain())
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def loss(q, k, v):
        run = jax.checkpoint(lambda *x: in_a_ring(*x, tokens, setting()), policy=policy)
        return jnp.sum(run(2 * q, 2 * k, 2 * v) ** 2)

    with jax.set_mesh(make_mesh(num_shards)):
        text = str(jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs()[:3]).jaxpr)
    keys_and_tokens = (turns + 1) * (num_shards - 1) * 3
    assert len(re.findall('= ppermute', text)) == keys_and_tokens + 2 * num_shards


@pytest.mark.parametrize(('num_shards', 'shape', 'axis'), [(3, (2, 30, 5), 1), (4, (5, 3, 8), -1)])
def test_zigzag_gives_each_shard_a_piece_from_either_end(num_shards, shape, axis):
    x = jnp.arange(math.prod(shape)).reshape(shape)
    arranged = context.zigzag(x, num_shards, axis)
    pieces = jnp.split(x, 2 * num_shards, axis)
    for i, shard in enumerate(jnp.split(arranged, num_shards, axis)):
        pair = jnp.concatenate([pieces[i], pieces[2 * num_shards - 1 - i]], axis)
        np.testing.assert_array_equal(shard, pair)
    np.testing.assert_array_equal(unzigzag(arranged, num_shards, axis), x)
    with pytest.raises(ValueError, match=f'multiple of {2 * num_shards}'):
        context.zigzag(x[:, :-1, :-1], num_shards, axis)


def test_rows_are_arranged_for_the_mesh_that_is_set():
    rows = {'tokens': jnp.arange(B * T).reshape(B, T), 'num_bytes': jnp.arange(B)}
    assert context.zigzag_rows(rows) is rows
    with jax.set_mesh(make_mesh(4)):
        arranged = jax.jit(context.zigzag_rows)(rows)
    np.testing.assert_array_equal(arranged['tokens'], context.zigzag(rows['tokens'], 4))
    np.testing.assert_array_equal(arranged['num_bytes'], rows['num_bytes'])
    assert arranged['tokens'].addressable_shards[0].data.shape == (B // 2, T // 4)


def test_zigzag_balances_every_step_of_a_causal_ring():
    num_shards, length = 8, 512

    def visible_pairs(positions):
        """[device, step]"""
        at = positions.reshape(num_shards, -1)
        pairs = np.array([[(q[:, None] >= k[None]).sum() for k in at] for q in at])
        assert pairs.sum() == length * (length + 1) // 2
        device = np.arange(num_shards)[:, None]
        return pairs[device, (device - np.arange(num_shards)) % num_shards]

    balanced = visible_pairs(np.asarray(context.zigzag(jnp.arange(length), num_shards, axis=0)))
    assert (balanced == balanced[:1]).all()
    assert balanced.max() < 1.1 * balanced.min()
    consecutive = visible_pairs(np.arange(length))
    assert consecutive.sum(axis=1).max() > 1.8 * consecutive.sum(axis=1).mean()


def opaque(name, arrays, out_shape):
    """A kernel of which XLA knows as little as of the real one; it gives zeros."""

    def body(*refs):
        for ref in refs[len(arrays) :]:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    return pl.pallas_call(body, out_shape=out_shape, name=name)(*arrays)


def heads_first(x):
    """The shape of an array as the TPU kernels write it."""
    return jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype)


def opaque_forward(q, k, v, tokens, _):
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    arrays = (q, k, v, tokens.key_positions, tokens.key_segment_ids)
    out, lse = opaque('attend', arrays, (heads_first(q), lse))
    return out.swapaxes(1, 2), lse


def opaque_backward(*arguments):
    *arrays, tokens, _ = arguments
    shapes = tuple(heads_first(x) for x in arrays[:3])
    arrays = (*arrays, tokens.key_positions, tokens.key_segment_ids)
    gradients = opaque('differentiate', arrays, shapes)
    return tuple(x.swapaxes(1, 2) for x in gradients)


@pytest.mark.slow
def test_keys_are_on_their_way_while_the_kernel_runs():
    """The schedule is compiled for four TPUs; none is needed."""
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")
    mesh = meshes.make(config.Mesh(fsdp=1, context=4), meshes.topology_devices('v5p:2x2x1'))
    where = NamedSharding(mesh, ROWS)
    shapes = [(1, 1024, heads, 128) for heads in (8, 2, 2)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in shapes]
    tokens = Tokens(jax.ShapeDtypeStruct((1, 1024), jnp.int32, sharding=where))
    kernel = Blockwise(opaque_forward, opaque_backward)

    def gradients(q, k, v, tokens):
        run = functools.partial(in_a_ring, kernel=kernel)
        return jax.vjp(lambda *x: run(*x, tokens, setting()), q, k, v)[1](q)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(gradients).lower(*arrays, tokens).compile()
    text = compiled.as_text()
    assert 'is_scheduled=true' in text
    in_flight, on_the_way = set(), {'attend': [], 'differentiate': []}
    for line in text[text.index('ENTRY') :].splitlines():
        if started := re.search(r'(\S+) = .* collective-permute-start\(', line):
            in_flight.add(started[1])
        elif done := re.search(r' collective-permute-done\((\S+)\)', line):
            in_flight.remove(done[1])
        elif kernel_name := re.search(r'%(attend|differentiate)\S* = .* custom-call\(', line):
            on_the_way[kernel_name[1]].append(len(in_flight))
    # k, v and tokens; then also dk and dv. The last step has no keys to send, and the first step
    # of the backward pass none either: here it takes those that the forward pass received.
    assert on_the_way == {'attend': [3, 3, 3, 0], 'differentiate': [0, 5, 5, 2]}
