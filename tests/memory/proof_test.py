"""The whole model under every policy: the same function, and proof of what is stored."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import config
from helios_jax.memory import policy, proof
from helios_jax.memory.linearized import inner_jaxprs
from helios_jax.model.loss import cross_entropy
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

B, T, D, N, K, H, F, E, X, EXPERT_F, V = 8, 13, 40, 6, 2, 8, 56, 4, 3, 24, 61
DENSE = config.Model(
    vocab_size=V, num_layers=6, embed_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=F,
    period='dense', compute_dtype='float32',
)  # fmt: skip
MOE = dataclasses.replace(
    DENSE,
    prefix='dense',
    period='moe',
    num_layers=3,
    moe=config.MoE(num_experts=E, num_experts_per_token=X, mlp_dim=EXPERT_F),
)
MIXED = dataclasses.replace(MOE, prefix='', period='dense,moe', num_layers=6)
# What a period of MIXED, one dense layer and one of experts, stores under each name.
STREAM = [(B, T, D)] * 2
KEPT = {
    'block_input': STREAM,
    'attention_input': STREAM,
    'q': [(B, T, N, H)] * 2,
    'k': [(B, T, K, H)] * 2,
    'v': [(B, T, K, H)] * 2,
    'attention_output': [(B, T, N, H)] * 2,
    'attention_update': STREAM,
    'attention_gate': STREAM,
    'mlp_input': STREAM,
    'gate_up': [(B, T, F)] * 2 + [(B * T * X, EXPERT_F)] * 2,
    'expert_input': [(B * T * X, D)],
    'router_choices': [(B, T, X)],
    'mlp_update': STREAM,
    'mlp_gate': STREAM,
    'final_hidden': [(B, T, D)],
}
# The reference recomputes its log-sum-exp, and one device dispatches to itself.
ELSEWHERE = {'log_sum_exp', 'dispatched'}


def fill(model):
    """Variables of a trained model's size, not of its initialisation: no gate is shut."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        name, value = jax.tree_util.keystr(path), rng.normal(size=leaf.shape)
        if 'scale' in name or "['embed']" in name:
            value = value if "['embed']" in name else 1 + 0.1 * value
        else:
            value *= 0.02 if 'bias' in name else leaf.shape[-2] ** -0.5
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(abstract_variables(Transformer(model))))


def loss_of(model, memory, platform=''):
    network = Transformer(model, memory, platform)

    def loss(params, router, tokens):
        variables = {'params': params, 'router': router}
        positions = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (B, 1))
        segment_ids = 1 + (positions > 8).astype(jnp.int32)
        hidden, reported = network.apply(variables, tokens, positions % 9, segment_ids)
        head = network.apply(variables, method='unembedding_weight')
        losses = cross_entropy(hidden, head, tokens, jnp.ones((B, T)), V)
        stats = jax.tree.leaves([s.z_loss for g in reported.values() for s in g.values()])
        return losses.total / (B * T) + sum(s.sum() for s in stats)

    return loss


def arguments(model):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)), jnp.int32)
    variables = fill(model)
    return variables['params'], variables.get('router', {}), tokens


def equations(jaxpr):
    """Primitive and output types, with what only differentiation looks at inlined."""
    for e in jaxpr.eqns:
        inner = inner_jaxprs(e)
        if e.primitive.name in ('custom_vjp_call', 'checkpoint', 'remat2', 'jit', 'pjit') and inner:
            yield from equations(inner[0])
            continue
        yield e.primitive.name, tuple(v.aval.str_short() for v in e.outvars)
        for j in inner:
            yield from equations(j)


@pytest.mark.parametrize('model', [DENSE, MOE, MIXED], ids=['dense', 'moe', 'mixed'])
def test_every_policy_computes_the_same_jaxpr(model):
    args = jax.eval_shape(lambda: arguments(model))
    of = lambda memory: list(equations(jax.make_jaxpr(loss_of(model, memory))(*args).jaxpr))  # noqa: E731
    plain = of(config.Memory('none'))
    assert len(plain) > 20
    for preset in policy.PRESETS:
        assert of(config.Memory(preset)) == plain, preset
