"""Bytes that one layer's backward pass holds at its peak, beside saved tensors and gradients.

Counts of tensors (measured.py) are read from schedules that XLA made for v5e, dense and MoE, under
`full`, `minimal`, `fp8` and `offload`; `helios plan --validate` holds them against the compiler's
figures. Those of a GPU are held against allocators' peaks on an H100.
"""

from helios_jax.arch import rules
from helios_jax.arch.weights import read_in_compute_dtype
from helios_jax.memory import policy
from helios_jax.plan import saved
from helios_jax.plan.arguments import layer_weights, local
from helios_jax.plan.measured import (
    AVERAGE_STREAMS,
    EMBEDDING_STREAMS,
    HYPER_STREAMS,
    IN_A_PART,
    INSIDE,
    INSIDE_QUANTISED,
    RECOMPUTED_OF_A_GATE,
    RECOMPUTED_STREAMS,
    REPLAYED_INSIDE,
    REPLAYED_STREAMS,
    STREAMS,
)
from helios_jax.plan.placement import Placement
from helios_jax.plan.saved import expert_slots, inside, shapes


def working_bytes(placement: Placement) -> int:
    """Counts the bytes that a layer's backward pass holds: the most over all kinds of layer."""
    model = placement.config.model
    return max(_layer(placement, kind) for kind in model.kind_counts)


def _layer(placement: Placement, kind: str) -> int:
    table = saved.tensor_actions(placement)
    model, tokens = placement.config.model, placement.local_tokens
    stream = tokens * model.embed_dim
    elements = STREAMS.value * stream
    if model.gmu.adds_embedding:
        elements += EMBEDDING_STREAMS.value * stream
    if model.value_residual:
        values = (model.num_kv_heads, model.head_dim), ('kv_heads', 'head_dim')
        elements += EMBEDDING_STREAMS.value * tokens * placement.elements(*values)
    elements += AVERAGE_STREAMS.value * model.num_averages * stream
    elements += HYPER_STREAMS.value * (model.gmu.num_streams - 1) * stream
    recomputed = set(saved.recomputed_by_backward(placement, kind, table)).intersection(
        ('q', 'k', 'v', 'attention_output', 'attention_update', 'mlp_update')
    )
    elements += sum(
        placement.elements(shape, axes)
        for value in recomputed
        for shape, axes in shapes(placement, value, kind)
    )
    if table['attention_update'] == 'remat':
        # A GPU's schedule has them all the same.
        in_parts = placement.config.memory.backward_parts > 1 and placement.platform != 'gpu'
        gates = 2 * RECOMPUTED_OF_A_GATE.value if model.gmu.has_gate and not in_parts else 0
        elements += (RECOMPUTED_STREAMS.value + gates) * stream
    elements += _feed_forward(placement, kind, table)
    if placement.config.memory.backward_parts > 1 and 'mlp_update' in recomputed:
        elements = max(elements, _mlp_again(placement, kind))
    return placement.dtype_bytes * elements + _cudnn_workspace(placement)


def _cudnn_workspace(placement: Placement) -> int:
    """Bytes in which cuDNN's attention adds up gradients: of q in float32, and with grouped heads
    of each query head's k and v in the compute dtype."""
    model = placement.config.model
    heads = placement.elements((model.num_heads, model.head_dim), ('heads', 'head_dim'))
    grouped = 2 * placement.dtype_bytes if model.num_heads > model.num_kv_heads else 0
    return placement.cudnn_sequences * placement.local_tokens * heads * (4 + grouped)


def _mlp_again(placement: Placement, kind: str) -> int:
    """Elements of a dense MLP as it runs again, whole, because the gate behind it reads its output.

    Only its backward pass is in parts.
    """
    stream = placement.local_tokens * placement.config.model.embed_dim
    return REPLAYED_STREAMS.value * stream + REPLAYED_INSIDE.value * inside(placement, kind)


def _feed_forward(placement: Placement, kind: str, table: dict[str, str]) -> int:
    """Elements of the tensors as wide as the feed-forward's inside.

    They are the gradients of gate and up, and one of gate, up and their product; values stored in a
    byte are decoded in the operations that read them. Experts add the rows sorted by expert:
    their gradient, and the rows themselves where they are not saved.

    With parts, each part computes all of these, while attention's tensors are not there.
    """
    parts = placement.config.memory.backward_parts
    if parts > 1 and not kind.startswith('moe'):
        part = IN_A_PART.value * inside(placement, kind) // parts
        return max(
            0,
            part - STREAMS.value * placement.local_tokens * placement.config.model.embed_dim,
        )
    quantised = bool(policy.parse(table['gate_up']).form)
    count = INSIDE_QUANTISED if quantised else INSIDE
    elements = count.value * inside(placement, kind)
    if kind.startswith('moe'):
        rows = expert_slots(placement) * placement.config.model.embed_dim
        elements += rows * (2 if table['expert_input'] == 'remat' else 1)
    return elements


def gathered_bytes(placement: Placement) -> int:
    """Bytes of a layer's whole weights, in the compute dtype, if the mesh splits them over `fsdp`.

    While a matmul computes, the weights of the next arrive and the gradient of the last leaves:
    together about the weights of a layer.
    """
    num_shards = rules.shards(placement, 'embed')
    if num_shards == 1:
        return 0
    narrow = [
        sum(local(placement, weight) for weight in weights if read_in_compute_dtype(weight.axes))
        for weights in layer_weights(placement)
    ]
    return placement.dtype_bytes * num_shards * max(narrow)
