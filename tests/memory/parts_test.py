"""Backward passes in parts: the function's own values and gradients, a part of the rest at once."""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from helios_jax import config
from helios_jax.arch import rules
from helios_jax.errors import UserError
from helios_jax.memory import policy
from helios_jax.memory.jaxprs import equations
from helios_jax.memory.parts import Cut, Parts, in_parts
from helios_jax.model.moe import swiglu
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, T, D, F = 2, 24, 6, 16
TOKENS = Cut(1, 'length')
COLUMNS, ROWS = Cut(1, 'mlp'), Cut(0, 'mlp')


def mix(weights, x, update):
    """Each token by itself, its gate a function of shared weights."""
    gate = jax.nn.sigmoid(
        jnp.einsum('btd,dr,re->bte', update, *weights[:2]) + weights[2].reshape(1, 1, D)
    )
    return x + gate * (update - x)


FUNCTIONS = {
    'hidden': (swiglu, lambda n: Parts(n, (None, COLUMNS, COLUMNS, ROWS), None)),
    'tokens': (mix, lambda n: Parts(n, (None, TOKENS, TOKENS), TOKENS)),
}


def arguments(name: str, dtype=jnp.float32):
    draw = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape) / 2, dtype)
    if name == 'hidden':
        return normal(B, T, D), normal(D, F), normal(D, F), normal(F, D)
    return (normal(D, 3), normal(3, D), normal(D)), normal(B, T, D), normal(B, T, D)


def value_and_gradients(function, given):
    value, vjp = jax.vjp(function, *given)
    cotangent = jnp.asarray(np.random.default_rng(6).standard_normal(value.shape), value.dtype)
    return value, vjp(cotangent)


def largest(jaxpr) -> int:
    """Elements of the largest array that a jaxpr computes, its inner ones included."""
    return max((v.aval.size for e in equations(jaxpr) for v in e.outvars), default=0)


@pytest.mark.parametrize('number', [1, 2, 4])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_values_are_the_functions_and_gradients_add_up(name, number):
    function, parts = FUNCTIONS[name]
    given = arguments(name)
    _, gradients = jax.jit(lambda *a: value_and_gradients(function, a))(*given)
    cut = partial(in_parts, function, parts(number))
    _, found = jax.jit(lambda *a: value_and_gradients(cut, a))(*given)
    # Without its gradient beside it, whose fusions move the last bit.
    own, value = jax.jit(cut)(*given), jax.jit(function)(*given)
    np.testing.assert_array_equal(own, value)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, gradients
    )


@pytest.mark.parametrize('name', FUNCTIONS)
def test_parts_over_a_mesh_are_those_of_one_device(name):
    function, parts = FUNCTIONS[name]
    given = arguments(name)
    cut = partial(in_parts, function, parts(2))
    run = lambda *a: value_and_gradients(cut, a)
    alone = jax.jit(run)(*given)
    mesh = meshes.make(config.Mesh(fsdp=2, context=2, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        spread = jax.jit(run)(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), spread, alone)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_only_arguments_are_saved(name):
    function, parts = FUNCTIONS[name]
    given = arguments(name)
    _, vjp = jax.vjp(partial(in_parts, function, parts(4)), *given)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(vjp))
    assert shapes == sorted(leaf.shape for leaf in jax.tree.leaves(given))


def test_the_backward_pass_holds_a_part_of_the_hidden_tensors():
    given = arguments('hidden')
    sizes = {}
    for number in (1, 2, 4):
        cut = partial(in_parts, swiglu, FUNCTIONS['hidden'][1](number))
        _, vjp = jax.vjp(cut, *given)
        sizes[number] = largest(jax.make_jaxpr(vjp)(jnp.ones((B, T, D))).jaxpr)
    whole, narrow = B * T * F, B * T * D  # the stream itself remains
    assert sizes == {1: whole, 2: whole // 2, 4: max(whole // 4, narrow)}


@pytest.mark.slow
def test_sums_over_parts_are_float32():
    weights, x, update = arguments('tokens', jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (weights, x, update))
    cut = partial(in_parts, mix, FUNCTIONS['tokens'][1](T))
    _, exact = value_and_gradients(mix, wide)
    _, found = value_and_gradients(cut, (weights, x, update))
    for a, b in zip(found[0], exact[0], strict=True):
        assert a.dtype == jnp.bfloat16
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 2**-6


SMALL = config.Model(
    vocab_size=64, num_layers=2, embed_dim=24, num_heads=6, num_kv_heads=2, head_dim=4, mlp_dim=40,
    period='dense', compute_dtype='float32',
)  # fmt: skip
MIXED = dataclasses.replace(
    SMALL, period='dense,moe', moe=config.MoE(num_experts=4, num_experts_per_token=2, mlp_dim=16)
)


def of_a_model(model: config.Model, memory: config.Memory, mesh: jax.sharding.Mesh | None = None):
    """Hidden states' loss and its gradient; no parameter is at its start."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, T)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T)[None], tokens.shape)
    variables = random_weights(abstract_variables(Transformer(model)))

    def loss(params):
        given = variables | {'params': params}
        hidden, _ = Transformer(model, memory).apply(given, tokens, positions)
        return jnp.mean(jnp.square(hidden * jnp.arange(24.0).reshape(1, 1, 24)))

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        return jax.jit(jax.value_and_grad(loss))(variables['params'])


@pytest.mark.parametrize(
    ('model', 'gmu', 'sizes'),
    [
        pytest.param(SMALL, config.GMU(), {}, marks=pytest.mark.slow),
        pytest.param(SMALL, config.GMU(kind='residual'), {}, marks=pytest.mark.slow),
        pytest.param(SMALL, config.GMU(kind='additive', gate='full'), {}, marks=pytest.mark.long),
        pytest.param(MIXED, config.GMU(kind='highway', gate='scalar'), {}, marks=pytest.mark.long),
        pytest.param(
            MIXED, config.GMU(), {'fsdp': 2, 'tensor': 2, 'context': 2}, marks=pytest.mark.slow
        ),
    ],
    ids=['convex', 'residual', 'additive-full', 'highway-scalar-moe', 'convex-moe-8'],
)
def test_a_models_gradient_in_parts_is_its_gradient(model, gmu, sizes):
    model = dataclasses.replace(model, gmu=gmu)
    mesh = meshes.make(config.Mesh(**sizes), jax.devices()[:8]) if sizes else None
    whole = of_a_model(model, config.Memory('full'), mesh)
    parts = of_a_model(model, config.Memory('full', backward_parts=2), mesh)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts[1], whole[1]
    )


@pytest.mark.parametrize('preset', ['minimal', 'fp8'])
def test_what_is_saved_is_not_recomputed_in_parts(preset):
    with pytest.raises(UserError, match=r'backward_parts=3.*gate_up is saved.*full'):
        policy.actions(config.Memory(preset, backward_parts=3))
    recomputed = config.Memory(preset, backward_parts=3, actions=config.Actions(gate_up='remat'))
    assert policy.actions(recomputed)['gate_up'] == 'remat'


def test_parts_of_nothing_are_refused():
    with pytest.raises(UserError, match=r"backward_parts=2.*'none'.*full"):
        config.Memory('none', backward_parts=2)
    with pytest.raises(UserError, match=r'memory.backward_parts'):
        config.Memory('full', backward_parts=0)


@pytest.mark.parametrize(
    ('parts', 'message'),
    [
        (5, r'data.row_length=24 must be a multiple of 10.*parts=5 times the 2 devices'),
        (3, r'model.mlp_dim=40 must be a multiple of 6.*backward_parts=3'),
    ],
)
def test_sizes_that_do_not_divide_are_refused(parts, message):
    cfg = config.Config(
        model=SMALL,
        data=config.Data(row_length=T),
        train=config.Train(batch_rows=8),
        memory=config.Memory('full', backward_parts=parts),
        mesh=config.Mesh(fsdp=2, tensor=2, context=2),
    )
    mesh = meshes.make(cfg.mesh, jax.devices()[:8])
    with pytest.raises(UserError, match=message):
        rules.check_parts(cfg, mesh)
