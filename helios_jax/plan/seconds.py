"""Seconds of a train step, in closed form: the time of each resource, and which one binds.

A device computes and passes over its memory by turns; the network, but for a share, and the link to
the host work beside both, and so far a step takes as long as the longest of these three. A state
that lies on the host is fetched and written back when all of that is done. Fractions of the makers'
peaks, and the passes over the stream, are those of one H100, and of steps compiled for TPUs
(measured.py). This ranks configurations; a measured step takes longer.
"""

import dataclasses

from helios_jax.arch import flops, grouped_matmul, rules
from helios_jax.arch.weights import all_weights
from helios_jax.chips import Chip
from helios_jax.plan.arguments import local
from helios_jax.plan.measured import (
    AVERAGE_PASSES,
    EMBEDDING_PASSES,
    HOST_FRACTION,
    HYPER_PASSES,
    Speeds,
    speeds,
)
from helios_jax.plan.peak import StepMemory
from helios_jax.plan.placement import Placement
from helios_jax.plan.saved import (
    expert_slots,
    inside,
    recomputed_by_backward,
    tensor_actions,
)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time of one step and its causes; FLOPs and bytes are one device's."""

    flops: float  # recomputation included
    memory_bytes: float
    network_bytes: float
    host_bytes: float
    compute: float
    memory: float
    network: float
    exposed: float  # time in `network` that nothing hides
    host: float
    update: float  # time in `host` that nothing hides: a state that comes and goes
    tokens_per_second: float  # tokens of all devices
    mfu: float

    @property
    def step(self) -> float:
        hidden = self.host - self.update
        return max(self.compute + self.memory + self.exposed, self.network, hidden) + self.update

    @property
    def bound(self) -> str:
        """Resource that a step waits for: compute | memory | network | host."""
        on_device = self.compute + self.memory
        if on_device >= max(self.network, self.host):
            return 'compute' if self.compute >= self.memory else 'memory'
        return 'network' if self.network >= self.host else 'host'


def step_seconds(placement: Placement, planned: StepMemory, chip: Chip) -> Seconds:
    cfg = placement.config
    tokens = cfg.train.batch_rows * cfg.data.row_length
    length = cfg.data.row_length
    attention = flops.attention_flops(cfg.model, length) * tokens / placement.num_devices
    matmul = 6 * flops.active_matmul(cfg.model) * tokens / placement.num_devices
    counted = matmul + attention
    again_matmul, again_attention = _recomputed(placement)
    matmul = (matmul + again_matmul) * _dense_experts(placement, chip)
    attention += again_attention
    reached = speeds(chip)
    memory_bytes = _memory_bytes(placement, planned, reached)
    network_bytes = _network_bytes(placement)
    saved_bytes = 2.0 * cfg.train.microbatches * planned.saved_host
    state_bytes = 2 * planned.arguments.on_host(placement)
    if cfg.memory.parameters == 'host':
        state_bytes += planned.arguments.parameters  # the copy that the model reads
    network = network_bytes / chip.network_bytes_per_second
    link = HOST_FRACTION.value * chip.host_bytes_per_second
    masked = 1 + reached.attention_tokens.value / length
    compute = matmul / reached.matmul.value + attention * masked / reached.attention.value
    made = Seconds(
        flops=matmul + attention,
        memory_bytes=memory_bytes,
        network_bytes=network_bytes,
        host_bytes=saved_bytes + state_bytes,
        compute=compute / chip.peak_flops,
        memory=memory_bytes / chip.hbm_bytes_per_second / reached.memory.value,
        network=network,
        exposed=reached.exposed.value * network,
        host=(saved_bytes + state_bytes) / link,
        update=state_bytes / link,
        tokens_per_second=0.0,
        mfu=0.0,
    )
    return dataclasses.replace(
        made,
        tokens_per_second=tokens / made.step,
        mfu=counted / made.step / chip.peak_flops,
    )


def _recomputed(placement: Placement) -> tuple[float, float]:
    """FLOPs (of matmuls, of attention) that the backward pass spends on recomputation."""
    model, cfg = placement.config.model, placement.config
    tokens = cfg.train.batch_rows * cfg.data.row_length / placement.num_devices
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    attention = flops.attention_flops(model, cfg.data.row_length) / 3 / model.num_layers
    total, total_attention = 0.0, 0.0
    for kind, layers in model.kind_counts.items():
        again = set(recomputed_by_backward(placement, kind, tensor_actions(placement)))
        moe = kind.startswith('moe')
        width = model.expert_mlp_dim * model.moe.num_experts_per_token if moe else model.mlp_dim
        of = {
            'q': 2 * D * N * H,
            'k': 2 * D * K * H,
            'v': 2 * D * K * H,
            'attention_update': 2 * D * N * H,
            'gate_up': 4 * D * width,
            'mlp_update': 2 * D * width,
        }
        if cfg.memory.backward_parts > 1 and not moe:
            # The update whole, for its gate's backward pass; then the inside once more, in parts.
            of['mlp_update'] += of['gate_up']
        total += layers * sum(n for value, n in of.items() if value in again) * tokens
        if again.intersection(('attention_output', 'log_sum_exp')):
            total_attention += layers * attention * tokens
    return total, total_attention


def _dense_experts(placement: Placement, chip: Chip) -> float:
    """Factor on the matmuls' FLOPs where every expert is computed for every row."""
    model = placement.config.model
    if not any(kind.startswith('moe') for kind in model.kind_counts):
        return 1.0
    widths = (model.embed_dim, model.expert_mlp_dim // placement.shape['tensor'])
    name = grouped_matmul.choose(chip.platform, model.compute_dtype, widths, chip.capability)
    if not grouped_matmul.ROWS[name].dense:
        return 1.0
    return float(model.moe.num_experts // placement.shape['expert'])


def _memory_bytes(placement: Placement, planned: StepMemory, reached: Speeds) -> float:
    """Bytes over HBM: the update, weights, saved tensors, elementwise passes over activations."""
    model, microbatches = placement.config.model, placement.config.train.microbatches
    weights = sum(local(placement, weight) for weight in all_weights(model))
    moments = planned.arguments.optimizer + planned.arguments.ema
    # Parameters and moments are read and written, gradients written and read; three bfloat16 reads.
    update = 8 * weights + 2 * moments + 8 * weights
    stream = placement.local_tokens * model.embed_dim * placement.dtype_bytes
    gates = 2 * reached.gate_passes.value if model.gmu.has_gate else 0
    if model.gmu.kind == 'hyper':
        gates = 2 * HYPER_PASSES.value * model.gmu.streams
    added = 2 * EMBEDDING_PASSES.value if model.gmu.adds_embedding else 0
    averages = AVERAGE_PASSES.value * model.num_averages
    passes = reached.stream_passes.value + gates + added + averages
    within, dense = 0, 0
    for kind, number in model.kind_counts.items():
        elements = number * inside(placement, kind)
        if kind.startswith('moe'):
            permuted = number * expert_slots(placement) * model.embed_dim
            passed = reached.expert_passes.value * elements
            passed += reached.permuted_passes.value * permuted
        else:
            dense += number
            passed = reached.inside_passes.value * elements
        within += passed * placement.dtype_bytes
    cut = placement.config.memory.backward_parts
    # In parts the gradient of an MLP's input, a float32 sum, is read and written in each.
    summed = 4 * stream * cut * dense if cut > 1 else 0
    layers = passes * stream * model.num_layers + within + summed
    gathered = reached.gathered_passes.value * planned.gathered * model.num_layers
    kept = 2 * sum(s.num_bytes for s in planned.saved)
    return float(update + microbatches * (layers + gathered + kept))


def _network_bytes(placement: Placement) -> float:
    """Bytes that a device sends: weights, gradients, tokens to experts, partial sums, keys."""
    model, shape = placement.config.model, placement.shape
    width = placement.dtype_bytes
    of_layers = [w for w in all_weights(model) if w.matmul and w.name != 'unembedding.w']
    owned = width * sum(local(placement, weight) for weight in of_layers)
    copies = shape['slice'] * shape['data']
    # Gathered for each pass, and its gradient reduced; then summed over the copies of the model.
    weights = 3 * owned * (shape['fsdp'] - 1)
    summed = 2 * owned * (copies - 1) / copies
    stream = placement.local_tokens * model.embed_dim * width
    # Sums of both sublayers in each of forward, recomputation and backward; two passes a sum.
    sums = 2 * 3 * 2 * stream * (shape['tensor'] - 1) / shape['tensor'] * model.num_layers
    routed = sum(n for kind, n in model.kind_counts.items() if kind.startswith('moe'))
    exchanged = 5 * stream * (shape['expert'] - 1) * routed
    keys = 2 * placement.local_tokens * model.num_kv_heads * model.head_dim * width
    keys //= rules.shards(placement, 'kv_heads')
    rings = 4 * keys * (shape['context'] - 1) * model.num_layers
    loss = 2 * stream * (shape['fsdp'] - 1)
    each = weights + sums + exchanged + rings + loss
    return float(placement.config.train.microbatches * (each + summed))
