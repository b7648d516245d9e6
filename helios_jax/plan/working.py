"""What one layer's backward pass holds at its peak, beside what was saved and all the gradients.

Counts of tensors are read from schedules that XLA made for v5e (libtpu 0.0.50, jax 0.12), dense and
MoE, under `full`, `minimal`, `fp8` and `offload`; `helios plan --validate` holds them against the
compiler's figures. Those of a GPU are held against allocators' peaks on an H100 (README.md).
"""

from helios_jax.arch import rules
from helios_jax.arch.weights import read_in_compute_dtype
from helios_jax.memory import policy
from helios_jax.plan import saved
from helios_jax.plan.layout import Layout
from helios_jax.plan.saved import expert_slots, shapes
from helios_jax.plan.state import layer_weights, local

# Arrays as wide as the stream in one sublayer's backward pass: x, x̂, the update, and the gradients
# of the stream, of the update and of what it was computed from.
STREAMS = 6
# A layer that runs again from its input holds both x̂ and the stream between its sublayers when its
# backward pass begins, and of each gated sublayer the gradients that those of its weights, which
# XLA computes last, are to be made of.
RECOMPUTED_STREAMS = 3
RECOMPUTED_OF_A_GATE = 2
# Both sublayers' x̂, the stream between them and its norm's, q, attention's output and update.
REPLAYED_STREAMS = 7
# As wide as a part of an MLP's inside: gate, up, their product, and the gradient of each.
IN_A_PART = 6


def working_bytes(layout: Layout) -> int:
    """The most that the backward pass of any layer holds."""
    model = layout.config.model
    return max(_layer(layout, kind) for kind in set(model.layer_kinds))


def _layer(layout: Layout, kind: str) -> int:
    table = saved.table(layout)
    model, tokens = layout.config.model, layout.local_tokens
    stream = tokens * model.embed_dim
    elements = STREAMS * stream
    recomputed = set(saved.recomputed_by_backward(layout, kind, table)).intersection(
        ('q', 'k', 'v', 'attention_output', 'attention_update', 'mlp_update')
    )
    elements += sum(
        layout.elements(shape, axes)
        for value in recomputed
        for shape, axes in shapes(layout, value, kind)
    )
    if table['attention_update'] == 'remat':
        # A GPU's schedule has them all the same.
        in_parts = layout.config.memory.backward_parts > 1 and layout.platform != 'gpu'
        gates = 2 * RECOMPUTED_OF_A_GATE if model.gmu.has_gate and not in_parts else 0
        elements += (RECOMPUTED_STREAMS + gates) * stream
    elements += _feed_forward(layout, kind, table)
    if layout.config.memory.backward_parts > 1 and 'mlp_update' in recomputed:
        elements = max(elements, _mlp_again(layout, kind))
    return layout.dtype_bytes * elements + _cudnn_workspace(layout)


def _cudnn_workspace(layout: Layout) -> int:
    """Bytes in which cuDNN's attention adds up gradients: of q in float32, and with grouped heads
    of each query head's k and v in the compute dtype."""
    model = layout.config.model
    heads = layout.elements((model.num_heads, model.head_dim), ('heads', 'head_dim'))
    grouped = 2 * layout.dtype_bytes if model.num_heads > model.num_kv_heads else 0
    return layout.cudnn_sequences * layout.local_tokens * heads * (4 + grouped)


def _mlp_again(layout: Layout, kind: str) -> int:
    """Elements of a dense MLP as it runs again, whole, because the gate behind it reads its output.

    Only its backward pass is in parts.
    """
    shape, axes = shapes(layout, 'gate_up', kind)[0]
    stream = layout.local_tokens * layout.config.model.embed_dim
    return REPLAYED_STREAMS * stream + 3 * layout.elements(shape, axes)


def _feed_forward(layout: Layout, kind: str, table: dict[str, str]) -> int:
    """Elements of the tensors as wide as the feed-forward's inside.

    The gradients of gate and up, and one of gate, up and their product; from a byte a value they
    are restored in the very operations that read them. Around experts, the rows sorted by expert as
    well: their gradient, and themselves where they are not saved.

    In parts, each computes all of them at a time when attention's own are not there.
    """
    parts = layout.config.memory.backward_parts
    if parts > 1 and not kind.startswith('moe'):
        shape, axes = shapes(layout, 'gate_up', kind)[0]
        part = IN_A_PART * layout.elements(shape, axes) // parts
        return max(0, part - STREAMS * layout.local_tokens * layout.config.model.embed_dim)
    quantised = bool(policy.parse(table['gate_up']).form)
    count = 2 if quantised else 3
    shape, axes = shapes(layout, 'gate_up', kind)[0]
    inside = count * layout.elements(shape, axes)
    if kind.startswith('moe'):
        rows = expert_slots(layout) * layout.config.model.embed_dim
        inside += rows * (2 if table['expert_input'] == 'remat' else 1)
    return inside


def gathered_bytes(layout: Layout) -> int:
    """One layer's weights whole, in the compute dtype, where the mesh splits them over `fsdp`.

    While a matmul computes, the weights of the next arrive and the gradient of the last leaves:
    together about the weights of a layer.
    """
    parts = rules.shards(layout, 'embed')
    if parts == 1:
        return 0
    narrow = [
        sum(local(layout, weight) for weight in weights if read_in_compute_dtype(weight.axes))
        for weights in layer_weights(layout)
    ]
    return layout.dtype_bytes * parts * max(narrow)
