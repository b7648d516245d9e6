"""Lists the tensors that live from forward to backward, and their bytes on one device.

A tensor that the table of actions saves costs memory only if the backward pass reads it: directly,
or to recompute something that is not saved. `_graph` says of each value in a layer what it is
computed from and whether a gradient reads it; the rest is a walk that stops at what is saved.
"""

import dataclasses
from typing import NamedTuple

from helios_jax.arch import buffers, rules, tensors
from helios_jax.arch.tensors import NAMES, TENSORS
from helios_jax.arch.weights import shared_mlp_dim
from helios_jax.memory import policy
from helios_jax.plan.measured import (
    AVERAGED,
    GATE,
    HYPER,
    NORM,
    OUTPUT_NORM,
    SILU,
    STATIC_GATE,
    STATIC_HYPER,
)
from helios_jax.plan.placement import DTYPE_BYTES, Placement


class SavedTensor(NamedTuple):
    """One named tensor of one layer kind, on one device."""

    name: str
    dtype: str
    place: str  # device | host
    layers: int  # number of layers that keep one each
    elements: int  # elements in one layer
    rows: int  # rows with an exponent of a byte each; 0 if not quantised

    @property
    def num_bytes(self) -> int:
        """Bytes of all its layers."""
        return self.layers * self.layer_bytes

    @property
    def layer_bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype] + self.rows


@dataclasses.dataclass(frozen=True)
class Graph:
    """The values of a layer that matter to its backward pass."""

    sources: dict[str, tuple[str, ...]]  # value → the values that it is computed from
    read: tuple[str, ...]  # values that gradients read


def saved_tensors(placement: Placement) -> list[SavedTensor]:
    """Lists what the whole model saves under the config's policy, bottom first.

    Raises:
      UserError: as `policy.actions`.
    """
    model = placement.config.model
    if placement.config.memory.policy == 'none':
        return [t for kind in model.kind_counts for t in _everything(placement, kind)]
    table = policy.actions(placement.config.memory)
    found = [
        tensor
        for kind in model.prefix_kinds
        for tensor in _of_layer(placement, kind, table, layers=1)
    ]
    for kind in model.period_kinds:
        found += _of_layer(placement, kind, table, layers=model.num_periods)
    return [*found, *_stored(placement, 'final_hidden', model.period_kinds[-1], table, layers=1)]


def read_by_backward(placement: Placement, kind: str, table: dict[str, str]) -> list[str]:
    """Lists the saved values of a layer that its backward pass reads."""
    return [value for value in _needed(placement, kind, table) if _is_saved(value, table)]


def recomputed_by_backward(placement: Placement, kind: str, table: dict[str, str]) -> list[str]:
    """Lists the values of a layer that its backward pass computes again."""
    return [value for value in _needed(placement, kind, table) if not _is_saved(value, table)]


def tensor_actions(placement: Placement) -> dict[str, str]:
    """Maps each tensor to the config's action; without a policy all are kept.

    Raises:
      UserError: as `policy.actions`.
    """
    if placement.config.memory.policy == 'none':
        return dict.fromkeys(NAMES, 'device')
    return policy.actions(placement.config.memory)


def _is_saved(value: str, table: dict[str, str]) -> bool:
    return table.get(value.removeprefix('kernel_'), 'remat') != 'remat'


def _needed(placement: Placement, kind: str, table: dict[str, str]) -> list[str]:
    """Lists the values that gradients read, and those that they are recomputed from."""
    graph = _graph(placement, kind, table)
    seen: set[str] = set()
    waiting = list(graph.read)
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            waiting += () if _is_saved(value, table) else graph.sources[value]
    return [value for value in graph.sources if value in seen]


def _graph(placement: Placement, kind: str, table: dict[str, str]) -> Graph:
    """Describes a layer of model/transformer.py; `kernel_q` is q in the form a kernel keeps."""
    model = placement.config.model
    unit = model.gmu
    kept = 'kernel_' if placement.keeps_quantised and policy.kernel_form(table) else ''
    qkv = tuple(f'{kept}{name}' for name in 'qkv')
    q, k = ('q_product', 'k_product') if model.qk_norm else ('attention_input',) * 2
    of_streams = unit.kind == 'hyper' and unit.hyper != 'static'  # logits that follow the token
    sources: dict[str, tuple[str, ...]] = {
        'block_input': (),
        'attention_input': ('block_input', *(['attention_gate'] if of_streams else [])),
        'q_product': ('attention_input',),
        'k_product': ('attention_input',),
        'q': (q,),
        'k': (k,),
        'v': ('attention_input',),
        'kernel_q': ('q', 'k', 'v'),  # one call of the kernel makes all of these
        'kernel_k': ('q', 'k', 'v'),
        'kernel_v': ('q', 'k', 'v'),
        'attention_output': ('q', 'k', 'v'),
        'log_sum_exp': ('q', 'k', 'v'),
        'attention_update': ('attention_output',),
    }
    read = ['block_input', 'attention_input', *qkv, 'attention_output']
    read += ['q_product', 'k_product'] if model.qk_norm else []
    read += ['log_sum_exp'] if placement.attention_kernel or placement.shape['context'] > 1 else []
    for name, stream in (('attention', 'block_input'), ('mlp', 'middle')):
        update = f'{name}_update'
        inputs = tuple(update if seen == 'output' else f'{name}_input' for seen in unit.sees)
        inputs = (stream,) if of_streams else inputs
        sources[f'{name}_gate'] = inputs
        if name == 'attention':
            gate = ('attention_gate',) if inputs else ()
            sources['middle'] = ('block_input', update, *gate)  # the stream between sublayers
            sources['mlp_input'] = ('middle', *(['mlp_gate'] if of_streams else []))
            sources |= _feed_forward(placement, kind)
        read += [*inputs, f'{name}_gate'] if inputs else []
        joined = name == 'mlp' and model.num_averages > 0  # averages read a layer's output
        read += [update] if unit.kind != 'residual' or unit.normalizes or joined else []
        # The gate's gradient is d y · (u − x) of a mix, d y · u of a sum.
        read += [stream] if unit.kind in ('convex', 'highway') else []
    read += ['middle', 'mlp_input', 'gate_up']
    read += ['router_choices', 'expert_input'] if kind.startswith('moe') else []
    return Graph(sources, tuple(read))


def _feed_forward(placement: Placement, kind: str) -> dict[str, tuple[str, ...]]:
    if not kind.startswith('moe'):
        return {'gate_up': ('mlp_input',), 'mlp_update': ('gate_up',)}
    arrived = 'dispatched' if placement.shape['expert'] > 1 else 'mlp_input'
    return {
        'router_choices': ('mlp_input',),
        'dispatched': ('mlp_input',),
        'expert_input': (arrived, 'router_choices'),
        'gate_up': ('expert_input', 'router_choices'),
        'mlp_update': ('gate_up', 'router_choices', 'mlp_input'),
    }


def _of_layer(
    placement: Placement, kind: str, table: dict[str, str], layers: int
) -> list[SavedTensor]:
    values = read_by_backward(placement, kind, table)
    return [s for value in values for s in _stored(placement, value, kind, table, layers)]


def _stored(
    placement: Placement, value: str, kind: str, table: dict[str, str], layers: int
) -> list[SavedTensor]:
    tensor = TENSORS[value.removeprefix('kernel_')]
    action = policy.parse(table[tensor.name])
    place = 'host' if action.host and placement.platform != 'cpu' else 'device'
    found = []
    for shape, axes in shapes(placement, tensor.name, kind):
        elements = placement.elements(shape, rules.fitting(shape, axes, placement))
        dtype, rows = tensor.dtype or placement.config.model.compute_dtype, 0
        if action.form and not tensor.exact:
            dtype = 'uint8' if action.form == 'fp8' else 'int8'
            rows = elements // placement.elements(shape[-1:], axes[-1:])
        found.append(SavedTensor(tensor.name, dtype, place, layers, elements, rows))
    return found


def shapes(placement: Placement, name: str, kind: str) -> list[tuple[tuple[int, ...], rules.Axes]]:
    """Lists (shape on all devices, logical axes) of a layer's tensors with this name."""
    model, axes = placement.config.model, TENSORS[name].axes
    rows, length = placement.microbatch_rows, placement.config.data.row_length
    if name == 'log_sum_exp':
        rows *= max(1, placement.cudnn_sequences)
    if kind.startswith('moe') and name in ('gate_up', 'dispatched', 'expert_input'):
        return _around_experts(placement, name)
    number = 2 if name == 'gate_up' else 1
    return [(tensors.shape(model, name, rows, length), axes)] * number


def _around_experts(placement: Placement, name: str) -> list[tuple[tuple[int, ...], rules.Axes]]:
    """Lists `shapes` of rows gathered or sorted for a device's experts, as many on every device."""
    model = placement.config.model
    if name == 'gate_up':
        B, T = placement.microbatch_rows, placement.config.data.row_length
        shared = shared_mlp_dim(model)
        # Gate and up are one product there.
        routed = ((expert_slots(placement), 2 * model.expert_mlp_dim), ('whole', 'mlp'))
        beside = ((B, T, shared), TENSORS[name].axes)
        return [routed] + [beside] * (2 if shared else 0)
    rows = placement.local_tokens * placement.shape['expert']
    rows = expert_slots(placement) if name == 'expert_input' else rows
    return [((rows, model.embed_dim), ('whole', 'stream'))]


def inside(placement: Placement, kind: str) -> int:
    """Elements that the last matrix of a feed-forward reads, shared experts' left out."""
    shape, axes = shapes(placement, 'gate_up', kind)[0]
    return placement.elements(shape, axes) // (2 if kind.startswith('moe') else 1)


def expert_slots(placement: Placement) -> int:
    """Number of buffer rows that one device's experts compute."""
    moe = placement.config.model.moe
    pairs = placement.local_tokens * placement.shape['expert'] * moe.num_experts_per_token
    capacity = buffers.expert_capacity(pairs, moe.num_experts, moe.capacity_factor)
    return moe.num_experts // placement.shape['expert'] * capacity if capacity else pairs


def _everything(placement: Placement, kind: str) -> list[SavedTensor]:
    """Lists the arrays that differentiation keeps of a layer without a policy, as traced.

    They are all named tensors, the product that the down projection reads, and the float32 forms at
    which norms, gates and SiLU are differentiated. The compiler does without a few of them.
    """
    model = placement.config.model
    layers = model.kind_counts[kind]
    found = _of_layer(placement, kind, dict.fromkeys(NAMES, 'device'), layers)
    stream = placement.local_tokens * model.embed_dim
    inside = sum(s.elements for s in found if s.name == 'gate_up') // 2
    gate = 0
    if model.gmu.has_gate:
        gate = STATIC_GATE.value if model.gmu.gate == 'static' else GATE.value
    if model.gmu.kind == 'hyper':
        each = STATIC_HYPER if model.gmu.hyper == 'static' else HYPER
        gate = each.value * model.gmu.streams + 1
    gate += OUTPUT_NORM.value if model.gmu.normalizes else 0
    averaged = AVERAGED.value if model.num_averages else 0
    wide = {
        'averages': averaged * stream,
        'norms': 2 * NORM.value * stream,
        'gates': 2 * gate * stream,
        'SiLU': SILU.value * inside,
    }
    found += [
        SavedTensor(f'({n})', 'float32', 'device', layers, size, 0) for n, size in wide.items()
    ]
    return [*found, SavedTensor('(product)', model.compute_dtype, 'device', layers, inside, 0)]
