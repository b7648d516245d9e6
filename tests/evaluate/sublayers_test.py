"""What is said of a model's gates, stream and experts is what they are."""

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
from helios_jax.evaluate import sublayers
from helios_jax.memory.jaxprs import equations
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, T, V, D, E = 2, 17, 61, 24, 5
DENSE = config.Model(
    vocab_size=V, num_layers=3, embed_dim=D, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=20,
    compute_dtype='float32',
)  # fmt: skip
MIXED = dataclasses.replace(
    DENSE, num_layers=5, prefix='dense', period='moe,dense', gmu=config.GMU(embedding='on'),
    value_residual=True,
    moe=config.MoE(num_experts=E, num_experts_per_token=2, mlp_dim=14),
)  # fmt: skip


def batch(rows=((9, 4, 2), (13,)), length=T) -> Batch:
    """Packed rows, the ends of which are padding."""
    positions, ids = packed_rows(rows, length)
    tokens = np.random.default_rng(0).integers(1, V, ids.shape).astype(np.int32) * (ids > 0)
    arrays = tokens, ids, positions, ids > 0, np.ones(len(rows), np.int32)
    return Batch(*map(jnp.asarray, arrays))


def with_gmu(model: config.Model, **settings) -> config.Model:
    return dataclasses.replace(model, gmu=config.GMU(**settings))


@functools.cache
def random_variables(model: config.Model):
    """Random weights; biases of gates and factors vary so much that some gates are saturated."""
    variables = random_weights(abstract_variables(Transformer(model)))
    spread = lambda path, x: 12 * x if path[-1].key == 'bias' else x
    return jax.tree_util.tree_map_with_path(spread, variables)


@functools.cache
def found(model: config.Model) -> dict:
    return sublayers.figures(
        Transformer(model), random_variables(model), batch(), documents_apart=True
    )


def test_gates_of_an_untrained_model_are_those_of_a_running_mean():
    zeros = jnp.zeros((1, 2), jnp.int32)
    variables = nn.unbox(jax.jit(Transformer(DENSE).init)(jax.random.key(0), zeros, zeros))
    seen = sublayers.figures(Transformer(DENSE), variables, batch(), documents_apart=True)
    assert seen['tokens'] == 9 + 4 + 2 + 13
    rows = seen['sublayers']
    assert [(row['layer'], row['sublayer']) for row in rows] == [
        (layer, name) for layer in (1, 2, 3) for name in ('attention', 'mlp')
    ]
    gates = 1 / np.arange(2, 8)
    for figure in ('gate_mean', 'gate_low', 'gate_high'):
        np.testing.assert_allclose([row[figure] for row in rows], gates, rtol=0, atol=2e-6)
    assert [row['gate_saturated'] for row in rows] == [0] * 6
    bins = [int(np.argmax(row['gate_histogram'])) for row in rows[1:3]]
    assert bins == [3, 2]  # of 1/3 and of 1/4


@pytest.mark.parametrize(
    'model', [DENSE, pytest.param(MIXED, marks=pytest.mark.slow)], ids=['dense', 'mixed']
)
def test_figures_are_those_of_the_gates_that_the_model_shows(model):
    """In every layer of a prefix and of a repeated period; padding is left out."""
    one, variables = batch(), random_variables(model)
    looking = jax.jit(functools.partial(Transformer(model).apply, mutable=['intermediates']))
    (_, reported), seen = looking(variables, one.tokens, one.positions, one.segment_ids)
    groups, real = seen['intermediates'], np.asarray(one.segment_ids > 0)
    rows, first = found(model)['sublayers'], len(model.prefix_kinds)
    assert len(rows) == 2 * model.num_layers
    for row in rows:
        index = row['layer'] - 1
        repeat, place = divmod(index - first, len(model.period_kinds))
        group, name = ('periods', f'layer_{place}') if index >= first else ('prefix', 'layer_0')
        unit = groups[group][name][f'{row["sublayer"]}_gmu']
        gate, stream = (np.asarray(unit[n][0], np.float64) for n in ('gate', 'stream_rms'))
        if index >= first:
            gate, stream = gate[repeat], stream[repeat]
        gate = gate[real]
        assert gate.shape == (real.sum(), D)
        assert row['gate_mean'] == pytest.approx(gate.mean(), abs=1e-5)
        counts, _ = np.histogram(gate, np.arange(11) / 10)
        assert counts.sum() == gate.size
        np.testing.assert_allclose(np.array(row['gate_histogram']) * gate.size, counts, atol=1.01)
        assert sum(row['gate_histogram']) == pytest.approx(1, abs=1e-6)
        saturated = np.mean((gate < 0.01) | (gate > 0.99))
        assert 0.01 < saturated < 0.99
        assert row['gate_saturated'] == pytest.approx(saturated, abs=1.01 / gate.size)
        ends = np.quantile(gate, sublayers.BAND, method='inverted_cdf')
        np.testing.assert_allclose([row['gate_low'], row['gate_high']], ends, rtol=0, atol=1e-5)
        assert row['stream_rms'] == pytest.approx(np.sqrt(np.mean(stream[real] ** 2)), rel=1e-4)
        routed = row['sublayer'] == 'mlp' and model.layer_kinds[index] == 'moe'
        assert ('expert_load' in row) == routed
        if routed:
            load = np.asarray(reported[group][name].load)[repeat]
            np.testing.assert_allclose(row['expert_load'], load / load.sum(), rtol=1e-6)
            assert sum(row['expert_load']) == pytest.approx(1, abs=1e-6)


def test_the_share_of_saturated_gates_is_that_of_the_biases_that_force_them():
    model = with_gmu(DENSE, gate='static')
    variables = random_weights(abstract_variables(Transformer(model)))
    biases = jnp.asarray([-8.0] * 5 + [8.0] * 4 + [0.5] * (D - 9))  # of channels
    force = lambda path, x: jnp.broadcast_to(biases, x.shape) if path[-1].key == 'bias' else x
    variables = jax.tree_util.tree_map_with_path(force, variables)
    seen = sublayers.figures(Transformer(model), variables, batch(), documents_apart=True)
    for row in seen['sublayers']:
        assert row['gate_saturated'] == pytest.approx(9 / D, abs=1e-6)
        shares = [5 / D, *[0] * 5, (D - 9) / D, 0, 0, 4 / D]
        np.testing.assert_allclose(row['gate_histogram'], shares, atol=1e-6)


def test_a_gate_for_several_channels_counts_as_often_as_others():
    gate = jnp.asarray(np.random.default_rng(1).random((B, T, 1)), jnp.float32)
    real = batch().segment_ids > 0
    observed = sublayers.Observed(DENSE, config.Memory('none'), real=real)
    look = observed.summary({'stream_rms': (jnp.full((B, T), 3.0),), 'gate': (gate,)})
    assert look['gate_mean'] == pytest.approx(np.mean(np.asarray(gate)[real]), abs=1e-6)
    assert look['stream_rms'] == pytest.approx(3, abs=1e-6)


@pytest.mark.parametrize('kind', ['residual', 'layerscale', 'hyper'])
def test_a_model_without_gates_has_its_factor_and_its_stream(kind):
    model = with_gmu(DENSE, kind=kind)
    rows = found(model)['sublayers']
    has = {'layer', 'sublayer', 'stream_rms'} | ({'factor_mean'} if kind == 'layerscale' else set())
    assert all(row.keys() == has for row in rows)
    if kind == 'layerscale':
        scales = random_variables(model)['params']['periods']['layer_0']['mlp_gmu']['scale']
        means = [row['factor_mean'] for row in rows if row['sublayer'] == 'mlp']
        np.testing.assert_allclose(means, scales.reshape(3, -1).mean(axis=-1), atol=1e-6)


def test_the_stream_below_the_lowest_sublayer_is_the_embedding():
    one = batch()
    embedded = random_variables(DENSE)['params']['embed']['w'][one.tokens][one.segment_ids > 0]
    rms = np.sqrt(np.mean(np.asarray(embedded, np.float64) ** 2))
    assert found(DENSE)['sublayers'][0]['stream_rms'] == pytest.approx(rms, rel=1e-5)


def test_gates_of_no_two_sublayers_exist_together():
    model = dataclasses.replace(DENSE, num_layers=7)
    shapes = nn.unbox(abstract_variables(Transformer(model)))
    run = functools.partial(sublayers.sums_of_batch, model=model, documents_apart=True)
    long = batch(((700,), (300, 500)), 1024)
    values = [v.aval for e in equations(jax.make_jaxpr(run)(shapes, long)) for v in e.outvars]
    assert max(v.size for v in values if v.shape[:1] == (7,)) < 2 * 1024 * D


@pytest.mark.slow
def test_a_mesh_changes_no_figure():
    """Rows, tokens, weights and experts are spread over eight devices."""
    model = dataclasses.replace(MIXED, moe=dataclasses.replace(MIXED.moe, num_experts=4))
    boxed = abstract_variables(Transformer(model))
    variables = random_variables(model)
    rows = batch(((20, 9), (30,), (5, 5, 5), (32,)), 32)
    alone = sublayers.figures(Transformer(model), variables, rows, documents_apart=True)
    mesh = meshes.make(config.Mesh(fsdp=2, context=2, expert=2))
    with jax.set_mesh(mesh):
        where = sharding.tree_shardings(mesh, sharding.logical_axes(boxed), nn.unbox(boxed))
        placed = jax.device_put(variables, where)
        spread = sharding.sharding(mesh, ('batch', 'length'))
        put = lambda x: jax.device_put(x, spread) if x.ndim == 2 else x
        seen = sublayers.figures(
            Transformer(model), placed, Batch(*map(put, rows)), documents_apart=True
        )
    assert seen['tokens'] == alone['tokens'] == 106
    for row, expected in zip(seen['sublayers'], alone['sublayers'], strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {'layer', 'sublayer'}:
            np.testing.assert_allclose(row[name], expected[name], rtol=0, atol=1e-3, err_msg=name)
