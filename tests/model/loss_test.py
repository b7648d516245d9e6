"""The chunked cross-entropy against log-softmax in float64, and what it never holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax import config
from helios_jax.arch import buffers
from helios_jax.memory.jaxprs import equations
from helios_jax.model import loss
from helios_jax.parallel import mesh as meshes

B, T, D, V, PADDED = 8, 6, 10, 37, 48
LOGITS_BYTES = 4 * B * T * PADDED


def inputs():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.2, 2, size=(B, T)) * (rng.uniform(size=(B, T)) > 0.3)
    return (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(D, PADDED)).astype(np.float32),
        rng.integers(0, V, size=(B, T), dtype=np.int32),
        weights.astype(np.float32),
    )


def direct(hidden, head, targets, weights, z_loss):
    """(total, nll, d hidden, d head), with the gradient written out."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    logits = hidden @ head[:, :V]
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    p = np.exp(logits - lse[..., None])
    d_logits = (1 + 2 * z_loss * lse)[..., None] * p - np.eye(V)[targets]
    d_logits *= weights[..., None]
    d_head = np.zeros_like(head)
    d_head[:, :V] = np.einsum('btd,btv->dv', hidden, d_logits)
    return (weights * (nll + z_loss * lse**2)).sum(), nll, d_logits @ head[:, :V].T, d_head


def evaluate(hidden, head, targets, weights, z_loss, factor=1.0):
    """The same of `cross_entropy`; `factor` multiplies the loss that is differentiated."""

    def scaled(hidden, head):
        losses = loss.cross_entropy(hidden, head, targets, weights, V, z_loss)
        return factor * losses.total, losses

    (_, losses), gradients = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(hidden, head)
    return losses.total, losses.nll, *gradients


def arrays():
    return [jnp.asarray(x) for x in inputs()]


@pytest.fixture(params=[1, 2, 3, 6])
def chunks(request, monkeypatch):
    monkeypatch.setattr(buffers, 'CHUNK_LOGITS_BYTES', LOGITS_BYTES / request.param)
    hidden, head, *_ = arrays()
    assert loss._num_chunks(hidden, head) == request.param
    return request.param


@pytest.mark.parametrize('z_loss', [0.0, 0.3])
def test_equals_log_softmax_in_float64(chunks, z_loss):
    actual = jax.jit(lambda *a: evaluate(*a, z_loss))(*arrays())
    for got, want in zip(actual, direct(*inputs(), z_loss), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # Without a gradient it runs other code.
    total, nll = jax.jit(lambda *a: loss.cross_entropy(*a, V, z_loss))(*arrays())
    np.testing.assert_allclose(total, actual[0], rtol=1e-6)
    np.testing.assert_allclose(nll, actual[1], rtol=1e-5, atol=1e-6)


def test_padded_vocabulary_never_contributes():
    hidden, head, targets, weights = arrays()
    loud = head.at[:, V:].set(1e6)
    run = jax.jit(lambda head: evaluate(hidden, head, targets, weights, 0.1, factor=3.0))
    first, second = run(head), run(loud)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.asarray(first[3][:, V:]).any()
    expected = direct(*inputs(), 0.1)
    np.testing.assert_allclose(first[3], 3 * expected[3], rtol=1e-5, atol=2e-5)
    logits = loss.project(hidden, loud, V)
    assert np.isneginf(logits[..., V:]).all()
    assert np.isfinite(logits[..., :V]).all()


def test_a_token_without_weight_counts_nothing():
    """Its target may be anything, and no gradient reaches it; its nll is reported all the same."""
    hidden, head, targets, weights = arrays()
    idle = np.asarray(weights) == 0
    other = jnp.where(jnp.asarray(idle), (targets + 5) % V, targets)
    run = jax.jit(lambda targets: evaluate(hidden, head, targets, weights, 0.1))
    first, second = run(targets), run(other)
    for i in (0, 2, 3):
        np.testing.assert_array_equal(first[i], second[i])
    assert not np.asarray(first[2])[idle].any()
    assert (np.asarray(first[1] != second[1]) == idle).all()


def test_bfloat16_hidden_states_keep_a_float32_head():
    hidden, head, targets, weights = arrays()
    narrow = hidden.astype(jnp.bfloat16)
    total, nll, d_hidden, d_head = evaluate(narrow, head, targets, weights, 0.0)
    assert (total.dtype, nll.dtype) == (jnp.float32, jnp.float32)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = np.asarray(head.astype(jnp.bfloat16), np.float32)
    expected = direct(np.asarray(narrow, np.float32), rounded, *inputs()[2:], 0.0)
    # Logits accumulate and stay in float32: only gradients are rounded.
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    np.testing.assert_allclose(nll, expected[1], rtol=1e-4, atol=1e-5)
    for got, want in ((d_hidden, expected[2]), (d_head, expected[3])):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=0, atol=1e-2 * np.abs(want).max()
        )


def largest_array(jaxpr):
    """Elements of the largest array with a vocabulary in it, inner jaxprs included."""
    sizes = [0]
    for equation in equations(jaxpr):
        avals = [v.aval for v in (*equation.invars, *equation.outvars)]
        sizes += [a.size for a in avals if any(n in (V, PADDED) for n in getattr(a, 'shape', ()))]
    return max(sizes)


def test_no_array_holds_the_logits_of_all_tokens(chunks):
    run = lambda *a: evaluate(*a, 0.1)
    largest = largest_array(jax.make_jaxpr(run)(*arrays()).jaxpr)
    # One chunk's logits, or the head and its gradient.
    assert largest == max(B * T * PADDED // chunks, D * PADDED)


MESHES = [{'fsdp': 8}, {'tensor': 4, 'fsdp': 2}, {'context': 2, 'expert': 2, 'data': 2}]


@pytest.mark.parametrize('num_chunks', [1, 3])
@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_split_over_a_mesh_equals_one_device(sizes, num_chunks, monkeypatch):
    # The bound is on each device's share.
    monkeypatch.setattr(buffers, 'CHUNK_LOGITS_BYTES', LOGITS_BYTES / num_chunks / 8)
    with jax.set_mesh(meshes.make(config.Mesh(**({'fsdp': 1} | sizes)))):
        assert loss._num_chunks(*arrays()[:2]) == num_chunks
        actual = jax.jit(lambda *a: evaluate(*a, 0.1))(*arrays())
    for got, want in zip(actual, direct(*inputs(), 0.1), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


rows = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=7, max_size=7)


@settings(max_examples=60)
@given(row=rows, other=rows)
def test_targets_are_the_next_token_of_the_same_document_where_it_counts(row, other):
    tokens = np.arange(20, 34, dtype=np.int32).reshape(2, 7)
    segment_ids = np.array([[s for s, _ in r] for r in (row, other)], np.int32)
    mask = np.array([[m for _, m in r] for r in (row, other)])
    targets, weights = loss.next_tokens(*(jnp.asarray(a) for a in (tokens, segment_ids, mask)))
    for b in range(2):
        for t in range(7):
            inside = t < 6 and segment_ids[b, t] > 0 and segment_ids[b, t + 1] == segment_ids[b, t]
            assert weights[b, t] == float(inside and mask[b, t + 1])
            assert not weights[b, t] or targets[b, t] == tokens[b, t + 1]
