"""The gated mix by kernel, in a layer: equal to XLA's formulas, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted

from helios_jax import config
from helios_jax.kernels import gated_norm
from helios_jax.model.block import Block
from helios_jax.parallel import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compilation')

ROUNDED = 3e-2  # sums over devices round otherwise; a part of them that was missed would be 50%


def block(kind, **settings):
    gmu = config.GMU(kind=kind, **settings)
    model = config.Model(
        embed_dim=128, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=96, gmu=gmu, norm_eps=1e-3
    )
    return Block(model, 'dense', backward_parts=1)


def distance(a, b):
    return float(jnp.linalg.norm(jnp.float32(a) - jnp.float32(b)))


def gradients(module, variables, x, d_out):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    run = lambda variables, x: module.apply(variables, x, 3, positions, None)[0]
    out, pull = jax.vjp(run, variables, x)
    return out, *pull(d_out)


FORMS = [
    ('highway', {}),
    ('additive', {'gate_input': 'output'}),
    ('layerscale', {'normalize_output': 'on'}),
    ('convex', {'gate': 'static'}),
]


@pytest.mark.parametrize(
    ('name', 'kind', 'settings'),
    [
        *(pytest.param(name, 'convex', {}, marks=pytest.mark.slow) for name in ('gpu', 'tpu')),
        *(pytest.param('tpu', *form, marks=pytest.mark.slow) for form in FORMS),
        *(pytest.param('gpu', *form, marks=pytest.mark.long) for form in FORMS),
    ],
)
def test_a_kernel_and_xla_agree_in_a_layer(name, kind, settings, random_variables, monkeypatch):
    module = block(kind, **settings)
    rng = np.random.default_rng(2)
    x, d_out = (jnp.asarray(rng.normal(size=(4, 16, 128)), jnp.bfloat16) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
    variables = random_variables(module, x, 3, positions, None)
    by_xla = jax.jit(functools.partial(gradients, module))(variables, x, d_out)
    calls = []
    kernel = interpreted(name)
    kernel.forward = lambda *given: calls.append(1) or interpreted(name).forward(*given)
    monkeypatch.setitem(gated_norm.KERNELS, 'cpu', kernel)
    by_kernel = jax.jit(functools.partial(gradients, module))(variables, x, d_out)
    assert calls
    wide = jax.tree.map(jnp.float32, (variables, x, d_out))
    exact = jax.jit(functools.partial(gradients, module))(*wide)
    for one, other, best in zip(*map(jax.tree.leaves, (by_kernel, by_xla, exact)), strict=True):
        assert distance(one, best) <= 1.5 * distance(other, best) + 1e-6 * distance(best, 0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['tpu', pytest.param('gpu', marks=pytest.mark.long)])
def test_eight_devices_compute_what_one_does(name, random_variables, monkeypatch):
    module = block('convex')
    monkeypatch.setitem(gated_norm.KERNELS, 'cpu', interpreted(name))
    rng = np.random.default_rng(3)
    x, d_out = (jnp.asarray(rng.normal(size=(8, 64, 128)), jnp.bfloat16) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(64), (8, 64))
    variables = random_variables(module, x, 3, positions, None)
    alone = jax.jit(functools.partial(gradients, module))(variables, x, d_out)
    mesh = meshes.make(config.Mesh(data=2, fsdp=2, context=2))
    with jax.set_mesh(mesh):
        shared = jax.jit(functools.partial(gradients, module))(variables, x, d_out)
    for one, other in zip(*map(jax.tree.leaves, (shared, alone)), strict=True):
        assert distance(one, other) <= ROUNDED * distance(other, 0)


def test_a_kernel_is_asked_for_a_devices_own_tokens(random_variables, monkeypatch):
    """512 tokens have blocks for both cores of a chip, the 64 of each of eight devices too."""
    module, asked = block('convex'), []
    kernel = interpreted('tpu')
    monkeypatch.setitem(gated_norm.KERNELS, 'cpu', kernel)
    kernel.refusal = lambda given, num_tokens: asked.append(num_tokens) or 'not today'
    x = jnp.zeros((8, 64, 128), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(64), (8, 64))
    variables = random_variables(module, x, 3, positions, None)
    with jax.set_mesh(meshes.make(config.Mesh(data=2, fsdp=2, context=2))):
        jax.eval_shape(lambda x: module.apply(variables, x, 3, positions, None), x)
    jax.eval_shape(lambda x: module.apply(variables, x, 3, positions, None), x)
    assert asked == [64, 64, 512, 512]


def test_a_gate_for_several_channels_is_left_to_xla(random_variables, monkeypatch, caplog):
    module = block('convex', gate='per_head')
    monkeypatch.setitem(gated_norm.KERNELS, 'cpu', interpreted('tpu'))
    gated_norm.log_refusal.cache_clear()
    x = jnp.zeros((4, 16, 128), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
    variables = random_variables(module, x, 3, positions, None)
    with caplog.at_level('INFO'):
        jax.eval_shape(lambda x: module.apply(variables, x, 3, positions, None), x)
    assert 'no gate that serves several channels' in caplog.text
