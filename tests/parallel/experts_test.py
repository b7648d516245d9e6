import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax import config
from helios_jax.parallel import experts
from helios_jax.parallel import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, T, D, F, E, X = 8, 6, 16, 14, 12, 3
assign_slots = jax.jit(experts.assign_slots, static_argnums=(1, 2))
choices = st.lists(st.integers(0, 5), min_size=12, max_size=12)  # 5: none of ours


@settings(max_examples=60)
@given(choices, st.sampled_from([0, 1, 2, 4]))
def test_slots_and_sources_are_inverse_and_sorted_by_expert(chosen, capacity):
    num_experts, num_pairs = 5, len(chosen)
    p = jax.tree.map(np.asarray, assign_slots(jnp.array(chosen, jnp.int32), num_experts, capacity))
    num_slots = len(p.source)
    counts = np.bincount(chosen, minlength=6)[:num_experts]
    kept = np.minimum(counts, capacity) if capacity else counts
    assert num_slots == (num_experts * capacity if capacity else num_pairs)

    for pair, slot in enumerate(p.slot):
        assert slot == num_slots or p.source[slot] == pair
    for slot, pair in enumerate(p.source):
        assert pair == num_pairs or p.slot[pair] == slot
    np.testing.assert_array_equal(p.group_sizes, kept)
    assert p.dropped == (counts - kept).sum()
    assert (p.slot < num_slots).sum() == kept.sum()

    # Each expert's slots: its pairs in their order, the first come first served.
    starts = np.arange(num_experts) * capacity if capacity else np.cumsum(kept) - kept
    for expert in range(num_experts):
        pairs = [pair for pair, e in enumerate(chosen) if e == expert][: kept[expert]]
        slots = p.source[starts[expert] : starts[expert] + kept[expert]]
        np.testing.assert_array_equal(slots, pairs)


@pytest.mark.slow
@settings(max_examples=10)
@given(choices, st.sampled_from([0, 2]))
def test_dispatch_and_combine_are_indexing_with_its_gradient(chosen, capacity):
    num_chosen, num_experts = 3, 5
    p = assign_slots(jnp.array(chosen, jnp.int32), num_experts, capacity)
    tokens = len(chosen) // num_chosen
    rng = np.random.default_rng(0)
    x = jnp.array(rng.standard_normal((tokens, 7)), jnp.float32)
    mix = jnp.array(rng.standard_normal((len(p.source), 7)), jnp.float32)
    back = jnp.array(rng.standard_normal((tokens, 7)), jnp.float32)
    weights = jnp.array(rng.standard_normal(len(chosen)), jnp.float32)

    def gathered(x, weights):
        slot = p.slot.reshape(-1, num_chosen)
        rows = experts.dispatch(x, p.source, slot, 'fill') * mix
        rows = rows * experts.reorder(weights, p.source, p.slot)[:, None]
        return jnp.sum(experts.combine(rows, p.source, slot, 'fill') * back)

    def plain(x, weights):
        pairs = jnp.repeat(x, num_chosen, axis=0) * weights[:, None]
        has_slot = (p.slot < len(p.source))[:, None]
        slots = jnp.minimum(p.slot, len(p.source) - 1)
        summed = jnp.where(has_slot, pairs * mix[slots], 0).reshape(-1, num_chosen, 7).sum(axis=1)
        return jnp.sum(summed * back)

    value, gradients = jax.value_and_grad(gathered, (0, 1))(x, weights)
    plain_value, plain_gradients = jax.value_and_grad(plain, (0, 1))(x, weights)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def inputs() -> tuple[jax.Array, ...]:
    """x, choices (distinct in each token, some E: none), weights and the three matrices."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.array(rng.standard_normal(shape) / 3, jnp.float32)
    chosen = np.argsort(rng.random((B, T, E)), axis=-1)[..., :X]
    chosen[:2, :4] = np.array([7, 8, 11])  # crowded
    chosen[5, 3:] = E
    weights = jnp.array(rng.random((B, T, X)), jnp.float32)
    matrices = draw(E, D, F), draw(E, D, F), draw(E, F, D)
    return draw(B, T, D), jnp.array(chosen, jnp.int32), weights, *matrices


def apply(x, chosen, weights, *matrices, capacity_factor=0.0, sharded=True):
    return experts.apply_experts(
        x, chosen, weights, *matrices, capacity_factor=capacity_factor, sharded=sharded
    )


def loop(x, chosen, weights, w_gate, w_up, w_down):
    """Every expert for every token, one by one."""
    y = jnp.zeros_like(x)
    for e in range(E):
        out = (jax.nn.silu(x @ w_gate[e]) * (x @ w_up[e])) @ w_down[e]
        y += out * jnp.sum(jnp.where(chosen == e, weights, 0), axis=-1, keepdims=True)
    return y


def value_and_gradients(of):
    x, chosen, *rest = inputs()
    target = jnp.cos(jnp.arange(B * T * D, dtype=jnp.float32)).reshape(B, T, D)

    def total(x, *rest):
        y = of(x, chosen, *rest)
        return jnp.sum(y * target), y

    return jax.jit(jax.grad(total, argnums=range(5), has_aux=True))(x, *rest)


@functools.cache
def expected():
    return value_and_gradients(loop)


def ours(*arrays):
    return apply(*arrays)[0]


def assert_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), actual, expected
    )


def test_without_a_mesh_it_is_a_loop_over_experts():
    assert_close(value_and_gradients(ours), expected())


@pytest.mark.parametrize(
    'sizes',
    [
        {'expert': 4, 'fsdp': 2},
        pytest.param({'expert': 2, 'tensor': 2, 'context': 2}, marks=pytest.mark.slow),
        pytest.param({'fsdp': 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_values_and_gradients(sizes):
    with jax.set_mesh(meshes.make(config.Mesh(**{'fsdp': 1} | sizes))):
        actual = jax.device_get(value_and_gradients(ours))
    assert_close(actual, expected())


@pytest.mark.slow
def test_capacity_drops_the_late_and_counts_them_on_every_mesh():
    x, chosen, *rest = inputs()
    counts = np.bincount(np.asarray(chosen).ravel(), minlength=E + 1)[:E]
    capacity = int(np.ceil(0.8 * B * T * X / E))
    too_many = np.maximum(counts - capacity, 0).sum()
    assert too_many > 0
    y, dropped = apply(x, chosen, *rest, capacity_factor=0.8)
    assert dropped == too_many
    # Dropping leaves a token the experts that had room.
    assert not np.allclose(y, loop(x, chosen, *rest), atol=1e-3)
    # One expert group, whose devices gather the same tokens in the same order.
    mesh = meshes.make(config.Mesh(fsdp=1, expert=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded, dropped = jax.jit(functools.partial(apply, capacity_factor=0.8))(x, chosen, *rest)
    assert dropped == too_many
    np.testing.assert_allclose(sharded, y, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_ample_capacity_drops_nothing():
    arrays = inputs()
    y, dropped = apply(*arrays, capacity_factor=float(E))
    assert dropped == 0
    np.testing.assert_allclose(y, loop(*arrays), rtol=2e-5, atol=2e-6)
