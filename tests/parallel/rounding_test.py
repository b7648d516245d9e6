"""Gradients that are summed over devices in bfloat16, against the same on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from helios_jax import config
from helios_jax.model.transformer import Transformer, abstract_variables

DEVICES, T, V = 64, 24, 80
MODEL = config.Model(
    vocab_size=V, num_layers=2, embed_dim=32, num_heads=6, num_kv_heads=2, head_dim=4, mlp_dim=56,
    compute_dtype='bfloat16', gmu=config.GMU(gate_input='both'),
)  # fmt: skip


@functools.cache
def gradients(compute_dtype: str) -> dict[str, np.ndarray]:
    """Gradients of each weight that a matmul takes, [DEVICES …] float32: one row of text each."""
    model = dataclasses.replace(MODEL, compute_dtype=compute_dtype)
    params = random_weights(abstract_variables(Transformer(MODEL)))['params']
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (DEVICES, T + 1)), jnp.int32)

    def loss(params, row):
        positions = jnp.arange(T)[None]
        hidden, _ = Transformer(model).apply({'params': params}, row[None, :-1], positions)
        target = jax.nn.one_hot(row[None, 1:], hidden.shape[-1])
        return jnp.mean(jnp.square(hidden.astype(jnp.float32) - target))

    found = jax.jit(lambda p: jax.lax.map(lambda row: jax.grad(loss)(p, row), tokens))(params)
    flat, _ = jax.tree_util.tree_flatten_with_path(found)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in flat
        if path[-1].key == 'w' and 'embed' not in jax.tree_util.keystr(path)
    }


def summed(each: np.ndarray) -> np.ndarray:
    """Adds up what the devices hold as a ring does: a sum is rounded at each of them."""
    return functools.reduce(lambda a, b: a + b, jnp.asarray(each, jnp.bfloat16)).astype(jnp.float32)


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.slow
@pytest.mark.parametrize('devices', [8, DEVICES])
def test_a_sum_over_devices_loses_less_than_products_in_bfloat16_do(devices):
    """docs/semantics.md: 0.12% · √devices of its norm, in the worst weight."""
    rounded, exact = gradients('bfloat16'), gradients('float32')
    assert len(rounded) == 13
    for name, each in rounded.items():
        each, true = each[:devices], exact[name][:devices].sum(0, dtype=np.float64)
        whole = each.sum(0, dtype=np.float64)
        lost = error(summed(each), whole)
        assert 0.5 * 0.0012 < lost / devices**0.5 < 1.3 * 0.0012, name
        assert lost < 0.5 * error(whole, true), name
