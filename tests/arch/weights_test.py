"""The table of weights, against the shapes and axes that the model makes."""

import dataclasses

import jax
import pytest

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.model.transformer import Transformer, abstract_variables

DENSE = config.Model(
    vocab_size=300, num_layers=3, embed_dim=48, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=56,
    tied_embeddings=True, gmu=config.GMU(gate='per_head'),
)  # fmt: skip
MIXED = dataclasses.replace(
    DENSE, num_layers=5, prefix='moe', period='dense_window,moe', window=7, tied_embeddings=False,
    qk_norm=True, qkv_bias=True, gmu=config.GMU(),
    moe=config.MoE(num_experts=12, mlp_dim=40, num_shared_experts=2),
)  # fmt: skip
GMUS = [
    *(
        config.GMU(kind=kind, gate=gate)
        for kind, gate in (
            ('additive', 'full'),
            ('highway', 'low_rank'),
            ('convex', 'static'),
            ('convex', 'scalar'),
            ('residual', 'low_rank'),
            ('layerscale', 'low_rank'),
            ('rezero', 'low_rank'),
        )
    ),
    config.GMU(embedding='on', stream_scale='on'),
    config.GMU(dwa='2x1'),
    *(
        config.GMU(kind='hyper', hyper=form, streams=3, normalize_output='on')
        for form in ('static', 'dynamic', 'constrained')
    ),
]


@pytest.mark.parametrize(
    'model',
    [DENSE, MIXED, *(dataclasses.replace(DENSE, gmu=gmu) for gmu in GMUS)],
    ids=lambda model: f'{model.period}-{model.gmu.kind}-{model.gmu.gate}-{model.gmu.hyper}',
)
def test_every_parameter_has_the_models_shape_and_axes(model):
    variables = abstract_variables(Transformer(model))
    made = {}
    is_boxed = lambda x: hasattr(x, 'names')
    leaves = jax.tree.leaves_with_path(variables['params'], is_leaf=is_boxed)
    for path, leaf in leaves:
        # A path ends at the box, whose attribute is no part of a name.
        name = jax.tree_util.keystr(path, simple=True, separator='.')
        made[name] = (leaf.value.shape, tuple(n or 'layers' for n in leaf.names))
    planned = {p.name: (p.shape, p.axes) for p in weights.all_weights(model)}
    assert planned == made
    products = {name for name in made if name.endswith('.w')} - {'embed.w'}
    assert {p.name for p in weights.all_weights(model) if p.matmul} == products
    routers = jax.tree.leaves(variables.get('router', {}), is_leaf=is_boxed)
    assert sorted(p.shape for p in weights.router_biases(model)) == sorted(
        leaf.value.shape for leaf in routers
    )
