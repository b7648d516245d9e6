"""Each name that JAX does not promise, held to a function that is traced here."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from helios_jax import config
from helios_jax.memory import jaxprs
from helios_jax.parallel import mesh as meshes

X = jnp.ones((3, 5))


def traced(function, *args):
    return jax.make_jaxpr(function)(*(args or (X,)))


def primitives(function, *args):
    return {jaxprs.primitive(e): e for e in jaxprs.equations(traced(function, *args))}


def test_a_name_is_read_back():
    found = primitives(lambda x: checkpoint_name(x * 2, 'mine'))
    assert jaxprs.given_name(found[jaxprs.NAME]) == 'mine'
    assert jaxprs.given_name(found['mul']) == ''


def test_a_scans_length_is_read():
    found = primitives(lambda x: jax.lax.scan(lambda c, r: (c + r, c), x[0], x))
    assert jaxprs.scan_length(found[jaxprs.SCAN]) == 3
    assert jaxprs.scan_length(found['add']) == 0


def test_a_constraint_and_a_shard_map_are_read():
    mesh = meshes.make(config.Mesh(fsdp=4), jax.devices()[:4])
    where = jax.sharding.NamedSharding(mesh, P('fsdp'))
    x = jnp.ones((8, 5))
    found = primitives(lambda x: jax.lax.with_sharding_constraint(x, where), x)
    assert jaxprs.constraint(found[jaxprs.CONSTRAINT]) == where
    local = jax.shard_map(jnp.sin, mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp'))
    found = primitives(local, x)
    assert jaxprs.constraint(found[jaxprs.SHARD_MAP]) is None
    (inner,) = jaxprs.inner_jaxprs(found[jaxprs.SHARD_MAP])
    assert inner.invars[0].aval.shape == (2, 5)
    named = jax.shard_map(
        lambda x: checkpoint_name(x + 1, 'inside'), mesh=mesh, in_specs=P('fsdp'),
        out_specs=P('fsdp'),
    )  # fmt: skip
    jaxpr = traced(lambda x: jax.jit(named)(x), x).jaxpr
    assert jaxprs.origin(jaxpr.outvars[0], jaxpr) == ('inside', (2, 5))


@pytest.mark.parametrize('wrap', [jax.jit, jax.checkpoint], ids=['jit', 'checkpoint'])
def test_calls_are_known_and_followed(wrap):
    jaxpr = traced(lambda x: wrap(lambda x: (x, checkpoint_name(x + 1, 'inside')))(x * 2)).jaxpr
    (call,) = [e for e in jaxpr.eqns if jaxprs.primitive(e) != 'mul']
    assert jaxprs.primitive(call) in jaxprs.CALLS
    product = jaxpr.eqns[0].outvars[0]
    assert jaxprs.source(jaxpr.outvars[0], jaxpr) is product
    assert jaxprs.origin(jaxpr.outvars[1], jaxpr) == ('inside', None)
    assert jaxprs.origin(product, jaxpr) == ('', None)


@pytest.mark.parametrize(
    ('name', 'function'),
    [
        ('reduce_precision', lambda x: jax.lax.reduce_precision(x, 8, 7)),
        ('reshape', lambda x: x.reshape(5, 3)),
        ('broadcast_in_dim', lambda x: x[None]),
        ('squeeze', lambda x: jax.lax.squeeze(x.reshape(1, 3, 5), [0])),
    ],
)
def test_identities_that_jax_inserts_are_looked_through(name, function):
    jaxpr = traced(lambda x: function(checkpoint_name(x * 2, 'mine'))).jaxpr
    assert name in {jaxprs.primitive(e) for e in jaxpr.eqns} & set(jaxprs.TRANSPARENT)
    assert jaxprs.origin(jaxpr.outvars[0], jaxpr) == ('mine', None)


def test_a_kernels_results_have_names():
    kernel, names = next(iter(jaxprs.KERNELS.items()))
    assert kernel == cudnn._dot_product_attention_fwd_p_wrapper.name
    assert names == ('attention_output', 'log_sum_exp')


def test_dead_code_goes_with_the_arguments_that_only_it_reads():
    closed = traced(lambda x, y, z: jnp.sin(x), X, X, X)
    live, used = jaxprs.without_dead_code(closed, [True, True, False])
    assert used == [True, False, True]
    assert len(live.jaxpr.invars) == 2
    assert [jaxprs.primitive(e) for e in live.jaxpr.eqns] == ['sin']
