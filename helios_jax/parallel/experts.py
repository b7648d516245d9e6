"""Sends tokens to experts and back, across the mesh.

Each device holds E/expert experts. The tokens of one expert group (the devices that differ along
the expert axis alone) are gathered, every device computes its own experts' share of every token,
and the shares are summed where the tokens came from. With X experts a token among a few devices
nearly every token visits nearly every device, so that gathering moves about what an exchange of
exactly the chosen tokens would, and its size never depends on the routing: nothing is dropped.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from helios_jax.arch.buffers import expert_capacity
from helios_jax.arch.rules import BATCH_AXES
from helios_jax.kernels.grouped_matmul import grouped_matmul
from helios_jax.parallel.sharding import spec


class Slots(NamedTuple):
    """Buffer slot of each (token, choice) pair, and the pair in each slot."""

    source: Int[Array, 'M']  # slot → pair n·X + x; num_pairs where the slot is empty
    slot: Int[Array, 'P']  # pair → slot; M where the pair has none
    group_sizes: Int[Array, 'E']  # rows of each local expert, slots sorted by expert
    dropped: Int[Array, '']


def assign_slots(experts: Int[Array, 'P'], num_experts: int, capacity: int) -> Slots:
    """Sorts pairs by expert; ids of `num_experts` belong to none of ours and take no slot.

    capacity 0 sizes the buffer for the worst case (every pair is ours). Otherwise each expert has
    `capacity` slots of its own, first come first served; pairs that find none are counted.
    """
    num_pairs = experts.shape[0]
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    ranks = jnp.arange(num_pairs, dtype=jnp.int32)
    of_rank = experts[order]
    ours = of_rank < num_experts
    if capacity:
        within = ranks - starts.at[of_rank].get(mode='fill', fill_value=0)
        kept = ours & (within < capacity)
        num_slots = num_experts * capacity
        slot_of_rank = jnp.where(kept, of_rank * capacity + within, num_slots)
        dropped = jnp.sum(ours & ~kept)
        sizes = jnp.minimum(sizes, capacity)
    else:
        num_slots, dropped = num_pairs, jnp.zeros((), jnp.int32)
        slot_of_rank = jnp.where(ours, ranks, num_slots)
    slot = jnp.zeros(num_pairs, jnp.int32).at[order].set(slot_of_rank)
    source = jnp.full(num_slots, num_pairs, jnp.int32).at[slot_of_rank].set(order, mode='drop')
    return Slots(source, slot, sizes, dropped)


def _rows(x: Float[Array, 'A D'], index: Int[Array, 'C']) -> Float[Array, 'C D']:
    """Returns x[index]; an index beyond x gives zeros."""
    return x.at[index].get(mode='fill', fill_value=0)


# Both directions gather: XLA would transpose a gather into a scatter-add, which is slow on TPU.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(
    x: Float[Array, 'A D'], source: Int[Array, 'M'], slot: Int[Array, 'P'], num_chosen: int
) -> Float[Array, 'M D']:
    """Copies row n of x to every slot of its pairs; empty slots are zero."""
    return _rows(x, source // num_chosen)


def _dispatch_forward(x, source, slot, num_chosen):
    return dispatch(x, source, slot, num_chosen), (slot,)


def _dispatch_backward(num_chosen, residuals, d_buffer):
    (slot,) = residuals
    d_pairs = _rows(d_buffer, slot).reshape(-1, num_chosen, d_buffer.shape[-1])
    wide = jnp.promote_types(d_buffer.dtype, jnp.float32)
    return d_pairs.sum(axis=1, dtype=wide).astype(d_buffer.dtype), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def collect(
    buffer: Float[Array, 'M D'], source: Int[Array, 'M'], slot: Int[Array, 'P']
) -> Float[Array, 'P D']:
    """Reads each pair's row of the buffer; zeros for a pair without a slot."""
    return _rows(buffer, slot)


def _collect_forward(buffer, source, slot):
    return collect(buffer, source, slot), (source,)


def _collect_backward(residuals, d_pairs):
    (source,) = residuals
    return _rows(d_pairs, source), None, None


collect.defvjp(_collect_forward, _collect_backward)


def _local(
    x: Float[Array, 'B T D'],
    choices: Int[Array, 'B T X'],
    weights: Float[Array, 'B T X'],
    w_gate: Float[Array, 'E D F'],
    w_up: Float[Array, 'E D F'],
    w_down: Float[Array, 'E F D'],
    first_expert: Int[Array, ''] | int,
    num_experts: int,
    capacity_factor: float,
    platform: str,
) -> tuple[Float[Array, 'B T D'], Int[Array, '']]:
    """Computes our experts' share of every token, and the number of pairs that they dropped."""
    (_, _, num_chosen), ours = choices.shape, w_gate.shape[0]
    tokens = x.reshape(-1, x.shape[-1])
    experts = choices.reshape(-1) - first_expert
    valid = (experts >= 0) & (experts < ours) & (choices.reshape(-1) < num_experts)
    capacity = expert_capacity(experts.shape[0], num_experts, capacity_factor)
    p = assign_slots(jnp.where(valid, experts, ours), ours, capacity)
    rows = dispatch(tokens, p.source, p.slot, num_chosen)
    rows = checkpoint_name(rows, 'expert_input')
    if capacity:
        rows = rows.reshape(ours, capacity, -1)
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        matmul = lambda x, w: jnp.einsum('ecd,edf->ecf', x, w, precision=exact)
    else:
        matmul = lambda x, w: grouped_matmul(x, w, p.group_sizes, platform=platform or None)
    gate = checkpoint_name(matmul(rows, w_gate), 'gate_up')
    up = checkpoint_name(matmul(rows, w_up), 'gate_up')
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    out = matmul(jax.nn.silu(wide).astype(gate.dtype) * up, w_down)
    out = collect(out.reshape(-1, x.shape[-1]), p.source, p.slot)
    out = out.reshape(*choices.shape, -1).astype(wide.dtype)
    y = jnp.einsum('btxd,btx->btd', out, weights.astype(wide.dtype))
    return y.astype(x.dtype), p.dropped


def apply_experts(
    x: Float[Array, 'B T D'],
    choices: Int[Array, 'B T X'],
    weights: Float[Array, 'B T X'],
    w_gate: Float[Array, 'E D F'],
    w_up: Float[Array, 'E D F'],
    w_down: Float[Array, 'E F D'],
    *,
    capacity_factor: float,
    sharded: bool,
    platform: str = '',
) -> tuple[Float[Array, 'B T D'], Int[Array, '']]:
    """Computes Σ_x weights_x · SwiGLU_{choices_x}(x), and the pairs dropped on all devices.

    Args:
      choices: expert ids; E means no expert (padding).
      capacity_factor: 0 drops nothing; above, each expert takes at most this times its even share
        of the pairs of one expert group.
      sharded: whether to work across the mesh that is set; False while initialising.
      platform: the one to compile for where it is not the running one.
    """
    num_experts = w_gate.shape[0]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not sharded:
        return _local(
            x, choices, weights, w_gate, w_up, w_down, 0, num_experts, capacity_factor, platform
        )

    def on_device(x, choices, weights, w_gate, w_up, w_down):
        gather = lambda a: jax.lax.all_gather(a, 'expert', axis=0, tiled=True)
        first = jax.lax.axis_index('expert') * w_gate.shape[0]
        tokens = checkpoint_name(gather(x), 'dispatched')
        y, dropped = _local(
            tokens, gather(choices), gather(weights), w_gate, w_up, w_down,
            first, num_experts, capacity_factor, platform,
        )  # fmt: skip
        y = jax.lax.psum(y, 'tensor')
        y = jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True)
        return y, jax.lax.psum(dropped, (*BATCH_AXES, 'context'))

    tokens = spec(('batch', 'length', 'stream'))
    up, down = PartitionSpec('expert', None, 'tensor'), PartitionSpec('expert', 'tensor', None)
    return jax.shard_map(
        on_device,
        in_specs=(tokens, tokens, tokens, up, up, down),
        out_specs=(tokens, PartitionSpec()),
        check_vma=False,
    )(x, choices, weights, w_gate, w_up, w_down)
