"""Gradients of sublayers are those of jax.grad on layers that are written out one by one."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed_rows
from random_weights import random_weights

from helios_jax import config
from helios_jax.data.pipeline import Batch
from helios_jax.evaluate import gradients
from helios_jax.memory.jaxprs import equations
from helios_jax.model.attention import Attention
from helios_jax.model.gmu import GatedMemoryUnit, input_eps
from helios_jax.model.layers import scaled
from helios_jax.model.loss import next_tokens, project
from helios_jax.model.moe import SwiGLU
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, T, V, D, L = 3, 17, 61, 24, 2
DENSE = config.Model(
    vocab_size=V, num_layers=L, embed_dim=D, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=20,
    compute_dtype='float32',
)  # fmt: skip
MIXED = dataclasses.replace(
    DENSE, num_layers=5, prefix='dense', period='moe,dense', gmu=config.GMU(embedding='on'),
    value_residual=True, moe=config.MoE(num_experts=5, num_experts_per_token=2, mlp_dim=14),
)  # fmt: skip


def batch(rows=((9, 4, 2), (13,), (3, 14)), length=T) -> Batch:
    """Packed rows, the ends of which are padding."""
    positions, ids = packed_rows(rows, length)
    tokens = np.random.default_rng(0).integers(1, V, ids.shape).astype(np.int32) * (ids > 0)
    arrays = tokens, ids, positions, ids > 0, np.ones(len(rows), np.int32)
    return Batch(*map(jnp.asarray, arrays))


def with_gmu(**settings) -> config.Model:
    return dataclasses.replace(DENSE, gmu=config.GMU(**settings))


@functools.cache
def variables_of(model: config.Model):
    return random_weights(abstract_variables(Transformer(model)))


def found(model: config.Model, memory: str = 'none') -> list[dict]:
    whole = Transformer(model, config.Memory(memory))
    return gradients.figures(
        whole, variables_of(model), batch(), documents_apart=True, compiler_options={}
    )


def mean_loss(model: config.Model, params, hidden):
    """The mean cross-entropy of the batch's targets, from all logits."""
    one = batch()
    targets, weights = next_tokens(one.tokens, one.segment_ids, one.loss_mask)
    logits = project(hidden, params['unembedding']['w'], model.vocab_size)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * weights) / weights.sum()


def written_out(model: config.Model, params, offsets):
    """The mean loss of a model of dense layers; offsets [2L B T D] are added behind sublayers."""
    one = batch()
    x = params['embed']['w'][one.tokens]
    for layer in range(L):
        own = jax.tree.map(lambda a, n=layer: a[n], params['periods']['layer_0'])
        for place, name in enumerate(('attention', 'mlp')):
            index = 2 * layer + place + 1
            x_hat = scaled(x, own[f'{name}_norm']['scale'], input_eps(model, index))
            if place:
                given = {'params': own['mlp']}
                update = SwiGLU(model, model.mlp_dim, 0).apply(given, x_hat)
            else:
                rows = x_hat, one.positions, one.segment_ids
                update = Attention(model, 0).apply({'params': own['attention']}, *rows)
            unit = GatedMemoryUnit(model, name)
            x, _ = unit.apply({'params': own.get(f'{name}_gmu', {})}, x, x_hat, update, index)
            x = x + offsets[index - 1]
    hidden = scaled(x, params['final_norm']['scale'], input_eps(model, 2 * L + 1))
    return mean_loss(model, params, hidden)


def norm(tree) -> float:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def weights_norms(model: config.Model, by_params) -> list[float]:
    """Norms of each sublayer's part of a gradient, bottom first."""
    first, norms = len(model.prefix_kinds), []
    for index in range(model.num_layers):
        repeat, place = divmod(index - first, len(model.period_kinds))
        if index < first:
            own = by_params['prefix'][f'layer_{index}']
        else:
            stacked = by_params['periods'][f'layer_{place}']
            own = jax.tree.map(lambda a, n=repeat: a[n], stacked)
        parts = {'attention': {'attention', 'attention_norm', 'attention_gmu'}}
        parts['mlp'] = own.keys() - parts['attention']
        norms += [norm([own[name] for name in of if name in own]) for of in parts.values()]
    return norms


@pytest.mark.parametrize(
    'model',
    [
        pytest.param(DENSE, marks=pytest.mark.long),
        pytest.param(with_gmu(kind='residual'), marks=pytest.mark.slow),
    ],
    ids=['gated', 'residual'],
)
def test_gradients_are_those_of_layers_written_out(model):
    params, offsets = variables_of(model)['params'], jnp.zeros((2 * L, B, T, D))
    take = jax.jit(jax.grad(functools.partial(written_out, model), argnums=(0, 1)))
    by_params, by_offsets = map(jax.device_get, take(params, offsets))
    rows, one = found(model), batch()
    assert [(row['layer'], row['sublayer']) for row in rows] == [
        (layer, name) for layer in (1, 2) for name in ('attention', 'mlp')
    ]
    _, weights = next_tokens(one.tokens, one.segment_ids, one.loss_mask)
    real, summed = np.asarray(one.segment_ids > 0), by_offsets * float(weights.sum())
    streams = [np.sqrt(np.mean(own[real] ** 2)) for own in summed]
    assert not summed[:, ~real].any()
    assert len({f'{size:.4g}' for size in streams}) == 2 * L
    np.testing.assert_allclose([row['stream_gradient'] for row in rows], streams, rtol=1e-4)
    of_weights = [row['weights_gradient'] for row in rows]
    np.testing.assert_allclose(of_weights, weights_norms(model, by_params), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    'model', [MIXED, with_gmu(kind='hyper', streams=3)], ids=['mixed', 'hyper']
)
def test_weights_of_every_architecture_have_the_gradient_of_the_whole_model(model):
    """A prefix, experts, and values of the first layer that all others read."""
    variables, one = variables_of(model), batch()

    def loss(params):
        given = {**variables, 'params': params}
        rows = one.tokens, one.positions, one.segment_ids
        return mean_loss(model, params, Transformer(model).apply(given, *rows)[0])

    by_params = jax.device_get(jax.jit(jax.grad(loss))(variables['params']))
    rows = found(model)
    of_weights = [row['weights_gradient'] for row in rows]
    np.testing.assert_allclose(of_weights, weights_norms(model, by_params), rtol=1e-4)
    assert all(np.isfinite(row['stream_gradient']) and row['stream_gradient'] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['full', pytest.param('minimal', marks=pytest.mark.long)])
def test_a_memory_policy_changes_no_figure(policy):
    for row, expected in zip(found(DENSE, policy), found(DENSE), strict=True):
        for name in ('stream_gradient', 'weights_gradient'):
            assert row[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.long
def test_a_mesh_changes_no_figure():
    """Rows, tokens, weights and experts are spread over eight devices."""
    model = dataclasses.replace(MIXED, moe=dataclasses.replace(MIXED.moe, num_experts=4))
    boxed = abstract_variables(Transformer(model))
    rows = batch(((20, 9), (30,), (5, 5, 5), (32,)), 32)
    take = functools.partial(
        gradients.figures, Transformer(model), documents_apart=True, compiler_options={}
    )
    alone = take(variables_of(model), rows)
    mesh = meshes.make(config.Mesh(fsdp=2, context=2, expert=2))
    with jax.set_mesh(mesh):
        where = sharding.tree_shardings(mesh, sharding.logical_axes(boxed), nn.unbox(boxed))
        spread = sharding.sharding(mesh, ('batch', 'length'))
        put = lambda x: jax.device_put(x, spread) if x.ndim == 2 else x
        seen = take(jax.device_put(variables_of(model), where), Batch(*map(put, rows)))
    for row, expected in zip(seen, alone, strict=True):
        for name in ('stream_gradient', 'weights_gradient'):
            assert row[name] == pytest.approx(expected[name], rel=1e-3)


def test_gradients_of_no_two_streams_exist_together():
    model = dataclasses.replace(DENSE, num_layers=7)
    run = functools.partial(
        gradients.sizes_of_batch, model=model, memory=config.Memory('full'), documents_apart=True
    )
    shapes = jax.eval_shape(lambda: variables_of(model))
    long = batch(((700,), (300, 500)), 1024)
    values = [v.aval for e in equations(jax.make_jaxpr(run)(shapes, long)) for v in e.outvars]
    stacked = [v.shape for v in values if v.shape[:1] == (7,) and v.size >= 7 * 2 * 1024 * D]
    # What the policy saves of each layer, its input, and nothing beside.
    assert set(stacked) == {(7, 2, 1024, D)}
