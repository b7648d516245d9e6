"""Table of every weight: its shape, its logical axes, and what follows from the axes.

The model makes its parameters from these rows, the planner counts them, and the optimizer takes a
weight's rule from its axes.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from helios_jax.arch.rules import RULES, Axes
from helios_jax.config import Model

NORM: Axes = ('norm',)  # logical axes of every RMSNorm's scale


class Weight(NamedTuple):
    """One array of float32 parameters."""

    name: str  # path of the parameter, joined by dots
    shape: tuple[int, ...]
    axes: Axes
    fan_in: int = 0  # inputs of the compute-dtype matmul that reads it; 0: no matmul does
    gain: float = 1.0  # its values start with a standard deviation of gain / √fan_in
    uses: int = 1  # vectors of a token that are multiplied with it

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matmul(self) -> bool:
        return self.fan_in > 0

    @property
    def expert(self) -> bool:
        """True if each expert has its own slice, so that a token uses only some of the weight."""
        return {'experts', 'mlp'} <= set(self.axes)


Rows = dict[str, Weight]  # name of a module's own weight → its row, whose path starts there


@functools.cache
def all_weights(model: Model) -> tuple[Weight, ...]:
    """Lists every weight; a layer of the period is stacked: its first axis counts repetitions."""
    found = [embedding(model), norm('final_norm', model.embed_dim)]
    found += [depth_weights(model)] if model.num_averages else []
    for i, kind in enumerate(model.prefix_kinds):
        found += _below(f'prefix.layer_{i}', layer(model, kind))
    for i, kind in enumerate(model.period_kinds):
        for row in _below(f'periods.layer_{i}', layer(model, kind)):
            shape, axes = (model.num_periods, *row.shape), ('layers', *row.axes)
            found.append(row._replace(shape=shape, axes=axes))
    return (*found, *(() if model.tied_embeddings else (unembedding(model),)))


def count(model: Model) -> int:
    """Number of parameters as stored, with the padded vocabulary."""
    return sum(weight.size for weight in all_weights(model))


def layer(model: Model, kind: str) -> list[Weight]:
    """Lists the weights of one layer."""
    D = model.embed_dim
    found = [norm('attention_norm', D), norm('mlp_norm', D)]
    found += _below('attention', attention(model).values())
    for sublayer in ('attention_gmu', 'mlp_gmu'):
        found += _below(sublayer, gmu(model).values())
    if not kind.startswith('moe'):
        return found + _below('mlp', swiglu(model, model.mlp_dim).values())
    found += _below('moe', moe(model).values())
    if model.moe.num_shared_experts:
        found += _below('moe.shared', swiglu(model, shared_mlp_dim(model)).values())
    return found


def embedding(model: Model) -> Weight:
    return Weight('embed.w', (model.padded_vocab_size, model.embed_dim), ('vocab', 'embed'))


def unembedding(model: Model) -> Weight:
    D, V = model.embed_dim, model.padded_vocab_size
    return Weight('unembedding.w', (D, V), ('stream', 'unembed_vocab'), D)


def averaged(model: Model) -> list[tuple[int, int]]:
    """Lists the terms of all depth-weighted averages: (number of an average, output it takes).

    Output 0 is the embedding's, output l that of layer l. Of an average the newest comes last.
    """
    p, k = model.gmu.dwa_period, model.gmu.dwa_dilation
    return [
        (number, output)
        for number in range(model.num_averages)
        for output in range(p * (number + 1) % k, p * (number + 1) + 1, k)
    ]


def depth_weights(model: Model) -> Weight:
    """Weights of the depth-weighted averages (DenseFormer), one a term."""
    return Weight('depth_weights', (len(averaged(model)),), ('gate',))


def norm(name: str, dim: int) -> Weight:
    return Weight(f'{name}.scale', (dim,), NORM)


def attention(model: Model) -> Rows:
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    rows = {
        'q': Weight('q.w', (D, N, H), ('embed', 'heads', 'head_dim'), D),
        'k': Weight('k.w', (D, K, H), ('embed', 'kv_heads', 'head_dim'), D),
        'v': Weight('v.w', (D, K, H), ('embed', 'kv_heads', 'head_dim'), D),
        'out': Weight('out.w', (N, H, D), ('heads', 'head_dim', 'embed'), N * H, gain(model)),
    }
    if model.qkv_bias:
        rows['q_bias'] = Weight('q_bias', (N, H), ('heads', 'head_dim'))
        for name in ('k_bias', 'v_bias'):
            rows[name] = Weight(name, (K, H), ('kv_heads', 'head_dim'))
    if model.value_residual:
        rows['value_mix'] = Weight('value_mix', (2,), ('gate',))
    if model.qk_norm:
        rows |= {'q_norm': norm('q_norm', H), 'k_norm': norm('k_norm', H)}
    return rows


def gain(model: Model) -> float:
    """Gain of a sublayer's last matrix: with `output_init=depth` the outputs of all 2L sublayers
    together start as large as one of them (GPT-2)."""
    return (2 * model.num_layers) ** -0.5 if model.output_init == 'depth' else 1.0


def swiglu(model: Model, F: int) -> Rows:
    D = model.embed_dim
    return {
        'gate': Weight('gate.w', (D, F), ('embed', 'mlp'), D),
        'up': Weight('up.w', (D, F), ('embed', 'mlp'), D),
        'down': Weight('down.w', (F, D), ('mlp', 'embed'), F, gain(model)),
    }


def moe(model: Model) -> Rows:
    """Weights of a router and its experts; shared experts are a `swiglu` beside them."""
    D, E, F = model.embed_dim, model.moe.num_experts, model.expert_mlp_dim
    return {
        'router': Weight('router.w', (D, E), ('embed', 'experts'), D),
        'gate': Weight('gate.w', (E, D, F), ('experts', 'embed', 'mlp'), D),
        'up': Weight('up.w', (E, D, F), ('experts', 'embed', 'mlp'), D),
        'down': Weight('down.w', (E, F, D), ('experts', 'mlp', 'embed'), F, gain(model)),
    }


def shared_mlp_dim(model: Model) -> int:
    """Hidden channels of all shared experts, which are one MLP."""
    return model.expert_mlp_dim * model.moe.num_shared_experts


def router_bias(model: Model) -> Weight:
    """Balance bias of a router: it is state, and no gradient trains it."""
    return Weight('bias', (model.moe.num_experts,), ('experts',))


def router_biases(model: Model) -> list[Weight]:
    """Lists the balance bias of every MoE layer, stacked as `all_weights` are."""
    bias, found = router_bias(model), []
    for kind in model.prefix_kinds:
        found += [bias] if kind.startswith('moe') else []
    stacked = bias._replace(shape=(model.num_periods, *bias.shape), axes=('layers', *bias.axes))
    return found + [stacked for kind in model.period_kinds if kind.startswith('moe')]


def gmu(model: Model) -> Rows:
    """Weights of a Gated Memory Unit; a kind that lacks a weight lacks its row."""
    D, unit, width = model.embed_dim, model.gmu, model.gate_width
    rows = {'output_norm': norm('output_norm', D)} if unit.normalizes else {}
    if unit.adds_embedding:
        rows['embedding'] = _vector('embedding', 1, D)
    if unit.scales_stream:
        rows['stream_scale'] = _vector('stream_scale', 1, D)
    if unit.kind == 'hyper':
        return rows | hyper(model)
    if not unit.has_gate:
        sizes = {'layerscale': D, 'rezero': 1}
        if unit.kind in sizes:
            rows['scale'] = _vector('scale', sizes[unit.kind], D)
        return rows
    if unit.gate == 'static':
        return rows | {'bias': _vector('bias', D, D)}
    for seen in unit.sees:
        rows[f'from_{seen}'] = Weight(f'from_{seen}.w', (D, width), ('embed', 'gate'), D)
    if unit.gate == 'low_rank':
        rows['out'] = Weight('out.w', (width, D), ('gate', 'gate_embed'), width)
    return rows | {'bias': _vector('bias', D if unit.gate == 'low_rank' else width, D)}


def hyper(model: Model) -> Rows:
    """Weights of a hyper-connection beside its output norm's scale."""
    D, n = model.embed_dim, model.gmu.streams
    rows = {'bias': Weight('bias', (n * (n + 2),), ('gate',))}
    if model.gmu.hyper == 'static':
        return rows
    if model.gmu.hyper == 'dynamic':
        shape, uses, factors = (D, n + 2), n, 2
    else:
        shape, uses, factors = (n * D, n * (n + 2)), 1, 3
    rows['from_streams'] = Weight('from_streams.w', shape, ('embed', 'gate'), shape[0], uses=uses)
    return rows | {'alpha': Weight('alpha', (factors,), ('gate',))}


def _vector(name: str, size: int, embed_dim: int) -> Weight:
    return Weight(name, (size,), ('gate_embed' if size == embed_dim else 'gate',))


def _below(module: str, rows: Iterable[Weight]) -> list[Weight]:
    return [row._replace(name=f'{module}.{row.name}') for row in rows]


def is_matrix(axes: Axes) -> bool:
    """True if a weight maps between the stream and a sublayer's inside; such weights decay.

    It has one `embed` axis on one side; heads, hidden units or the router's experts on the other.

    Raises:
      ValueError: an axis that the sharding table lacks.
    """
    if unknown := set(axes) - set(RULES):
        raise ValueError(f'logical axes {axes}: unknown {", ".join(sorted(unknown))}.')
    inside = {'heads', 'kv_heads', 'head_dim', 'mlp'}.intersection(axes)
    outside = {'vocab', 'unembed_vocab', 'gate', 'gate_embed'}.intersection(axes)
    return axes.count('embed') == 1 and not outside and (bool(inside) or is_router(axes))


def is_router(axes: Axes) -> bool:
    return [axis for axis in axes if axis != 'layers'] == ['embed', 'experts']


def muon_sides(axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Positions in `axes` of the rows (inputs) and columns (outputs) of Muon's matrix.

    None for a weight that Muon leaves to AdamW. Each layer and each expert has its own matrix; all
    heads are one side.
    """
    if not is_matrix(axes) or is_router(axes):
        return None
    embed = axes.index('embed')
    rest = tuple(i for i, axis in enumerate(axes) if axis not in ('layers', 'experts', 'embed'))
    if embed < min(rest):
        return (embed,), rest
    if embed > max(rest):
        return rest, (embed,)
    raise ValueError(f'logical axes {axes}: embed lies between the other axes of the matrix.')


def read_in_compute_dtype(axes: Axes) -> bool:
    """True if the model reads a weight with these logical axes in the compute dtype alone.

    So are all matmul weights but the router's, whose product is float32, and both embeddings, whose
    gradients add up in float32 over chunks of the loss. Norms and the gates' vectors, of one axis,
    are read in float32.
    """
    own = [axis for axis in axes if axis != 'layers']
    wide = own[-1] == 'experts' or {'vocab', 'unembed_vocab'}.intersection(own)
    return len(own) > 1 and not wide
