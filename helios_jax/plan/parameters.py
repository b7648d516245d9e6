"""Every parameter's shape and logical axes, by walking the architecture in closed form.

The truth is `model.transformer.abstract_variables`, which a test compares with; this needs no JAX.
"""

import functools
import math
from typing import NamedTuple

from helios_jax.config import Model
from helios_jax.parallel.rules import Axes


class Parameter(NamedTuple):
    """One array of float32 parameters."""

    name: str  # path, joined by dots
    shape: tuple[int, ...]
    axes: Axes
    matmul: bool  # an Einsum's weight, cast to the compute dtype where it is used

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@functools.cache
def parameters(model: Model) -> tuple[Parameter, ...]:
    """Of the whole model; those of a period's layers have its repetitions as their first axis."""
    D, V = model.embed_dim, model.padded_vocab_size
    found = [
        Parameter('embed.w', (V, D), ('vocab', 'embed'), False),
        Parameter('final_norm.scale', (D,), ('norm',), False),
    ]
    for i, kind in enumerate(model.prefix_kinds):
        for p in layer(model, kind):
            found.append(p._replace(name=f'prefix.layer_{i}.{p.name}'))
    for i, kind in enumerate(model.period_kinds):
        for p in layer(model, kind):
            found.append(
                Parameter(
                    f'periods.layer_{i}.{p.name}',
                    (model.num_periods, *p.shape),
                    ('layers', *p.axes),
                    p.matmul,
                )
            )
    if not model.tied_embeddings:
        found.append(Parameter('unembedding.w', (D, V), ('stream', 'unembed_vocab'), True))
    return tuple(found)


def layer(model: Model, kind: str) -> list[Parameter]:
    """Of one layer."""
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    found = [_norm('attention_norm', D), _norm('mlp_norm', D)]
    for name, heads, axis in (('q', N, 'heads'), ('k', K, 'kv_heads'), ('v', K, 'kv_heads')):
        found.append(_einsum(f'attention.{name}', (D, heads, H), ('embed', axis, 'head_dim')))
    found.append(_einsum('attention.out', (N, H, D), ('heads', 'head_dim', 'embed')))
    if model.qk_norm:
        found += [_norm('attention.q_norm', H), _norm('attention.k_norm', H)]
    for sublayer in ('attention_gmu', 'mlp_gmu'):
        found += [p._replace(name=f'{sublayer}.{p.name}') for p in gmu(model)]
    return found + (_moe(model) if kind.startswith('moe') else _swiglu('mlp', D, model.mlp_dim))


def gmu(model: Model) -> list[Parameter]:
    """Of one Gated Memory Unit."""
    D, unit = model.embed_dim, model.gmu
    found = [_norm('output_norm', D)] if unit.normalizes else []
    if unit.kind == 'residual':
        return found
    if not unit.has_gate:
        return [*found, _vector('scale', D if unit.kind == 'layerscale' else 1, D)]
    if unit.gate == 'static':
        return [*found, _vector('bias', D, D)]
    width = model.gate_width
    found.append(_einsum('from_input', (D, width), ('embed', 'gate')))
    if unit.kind != 'highway':
        found.append(_einsum('from_output', (D, width), ('embed', 'gate')))
    if unit.gate == 'low_rank':
        found.append(_einsum('out', (width, D), ('gate', 'gate_embed')))
        width = D
    return [*found, _vector('bias', width, D)]


def router_biases(model: Model) -> list[Parameter]:
    """Balance biases of the MoE layers: state, but not trained by gradient."""
    E = model.moe.num_experts
    prefix = [
        Parameter(f'prefix.layer_{i}', (E,), ('experts',), False)
        for i, kind in enumerate(model.prefix_kinds)
        if kind.startswith('moe')
    ]
    return prefix + [
        Parameter(f'periods.layer_{i}', (model.num_periods, E), ('layers', 'experts'), False)
        for i, kind in enumerate(model.period_kinds)
        if kind.startswith('moe')
    ]


def _einsum(name: str, shape: tuple[int, ...], axes: Axes) -> Parameter:
    return Parameter(f'{name}.w', shape, axes, True)


def _norm(name: str, dim: int) -> Parameter:
    return Parameter(f'{name}.scale', (dim,), ('norm',), False)


def _vector(name: str, size: int, embed_dim: int) -> Parameter:
    return Parameter(name, (size,), ('gate_embed' if size == embed_dim else 'gate',), False)


def _swiglu(name: str, D: int, F: int) -> list[Parameter]:
    up = [_einsum(f'{name}.{which}', (D, F), ('embed', 'mlp')) for which in ('gate', 'up')]
    return [*up, _einsum(f'{name}.down', (F, D), ('mlp', 'embed'))]


def _moe(model: Model) -> list[Parameter]:
    D, E, F = model.embed_dim, model.moe.num_experts, model.expert_mlp_dim
    found = [_einsum('moe.router', (D, E), ('embed', 'experts'))]
    for name in ('gate', 'up'):
        found.append(_einsum(f'moe.{name}', (E, D, F), ('experts', 'embed', 'mlp')))
    found.append(_einsum('moe.down', (E, F, D), ('experts', 'mlp', 'embed')))
    if model.moe.num_shared_experts:
        found += _swiglu('moe.shared', D, F * model.moe.num_shared_experts)
    return found
