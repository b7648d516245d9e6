"""Sends tokens to experts and back, across the mesh.

Each device holds E/expert experts. The tokens of one expert group (the devices that differ along
the expert axis alone) are gathered, every device computes its own experts' share of every token,
and the shares are summed where the tokens came from. With X experts a token among a few devices
nearly every token visits nearly every device, so that gathering moves about what an exchange of
exactly the chosen tokens would, and its size never depends on the routing: nothing is dropped.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from helios_jax.arch.buffers import expert_capacity
from helios_jax.arch.rules import BATCH_AXES
from helios_jax.kernels import permutation, swiglu
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
    ranks = jnp.arange(num_pairs, dtype=jnp.int32)
    of_rank, order = jax.lax.sort((experts, ranks), num_keys=1, is_stable=True)
    # Counted in the sorted ids: adding ones up in each expert's place would be a scatter.
    ids = jnp.arange(num_experts + 1, dtype=jnp.int32)
    bounds = jnp.searchsorted(of_rank, ids, method='compare_all').astype(jnp.int32)
    sizes = jnp.diff(bounds)
    ours = of_rank < num_experts
    if capacity:
        within = ranks - bounds[jnp.minimum(of_rank, num_experts)]
        kept = ours & (within < capacity)
        num_slots = num_experts * capacity
        slot_of_rank = jnp.where(kept, of_rank * capacity + within, num_slots)
        source = jnp.full(num_slots, num_pairs, jnp.int32).at[slot_of_rank].set(order, mode='drop')
        dropped = jnp.sum(ours & ~kept)
        sizes = jnp.minimum(sizes, capacity)
    else:
        slot_of_rank = jnp.where(ours, ranks, num_pairs)
        source = jnp.where(ours, order, num_pairs)
        dropped = jnp.zeros((), jnp.int32)
    slot = jnp.zeros(num_pairs, jnp.int32).at[order].set(slot_of_rank, unique_indices=True)
    return Slots(source, slot, sizes, dropped)


def _rows(x: Array, index: Int[Array, '...']) -> Array:
    """Returns x[index], zeros for an index beyond x."""
    return x.at[index].get(mode='fill', fill_value=0)


# All directions gather: XLA would transpose a gather into a scatter-add, which is slow.
@jax.custom_vjp
def reorder(
    x: Float[Array, 'A'], source: Int[Array, 'C'], back: Int[Array, 'A']
) -> Float[Array, 'C']:
    """Returns x[source], zeros beyond x; `back` is where each element of x went."""
    return _rows(x, source)


reorder.defvjp(
    lambda x, source, back: (_rows(x, source), back),
    lambda back, d_out: (_rows(d_out, back), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dispatch(
    x: Float[Array, 'A D'],
    source: Int[Array, 'M'],
    slot: Int[Array, 'A X'],
    mode: str,
    platform: str = '',
) -> Float[Array, 'M D']:
    """Copies row n of x to every slot of its pairs.

    Args:
      mode: what an empty slot receives: 'fill': zeros; 'clip': the last row. A grouped matmul does
        not read what belongs to no group, and gives zeros for it: there 'clip' saves a pass that
        blanks.
      platform: as `apply_experts`.
    """
    index = source // slot.shape[1]
    return _rows(x, index) if mode == 'fill' else permutation.take(x, index, platform or None)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def combine(
    rows: Float[Array, 'M D'],
    source: Int[Array, 'M'],
    slot: Int[Array, 'A X'],
    mode: str,
    platform: str = '',
) -> Float[Array, 'A D']:
    """Sums the slots of each token's pairs in float32.

    Args:
      mode: 'fill': a pair without a slot adds nothing; 'clip': it adds the last row, which belongs
        to no group if there is such a pair, and is zero.
      platform: as `apply_experts`.
    """
    if mode == 'clip':
        return permutation.take_sums(rows, slot, platform or None)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return _rows(rows, slot).sum(axis=1, dtype=wide).astype(rows.dtype)


# Each is the other's transpose.
dispatch.defvjp(
    lambda x, source, slot, *how: (dispatch(x, source, slot, *how), (source, slot)),
    lambda mode, platform, at, d_rows: (combine(d_rows, *at, mode, platform), None, None),
)
combine.defvjp(
    lambda rows, source, slot, *how: (combine(rows, source, slot, *how), (source, slot)),
    lambda mode, platform, at, d_x: (dispatch(d_x, *at, mode, platform), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def through_swiglu(
    matmul: Callable[[Array, Array, Array], Array],
    platform: str,
    gate_up: Float[Array, 'M two_F'],
    weight: Float[Array, 'M'],
    down: Float[Array, 'E _ _'],
    sizes: Int[Array, 'E'],
) -> Float[Array, 'M D']:
    """Multiplies SwiGLU's weighted results with the last matrix of each row's expert.

    The backward pass keeps neither: it makes the product again where it reads gate and up.
    """
    return matmul(swiglu.multiply(gate_up, weight), down, sizes)


def _through_swiglu_backward(
    matmul: Callable, platform: str, saved: tuple, d_out: Float[Array, 'M D']
) -> tuple[Array, Array, Array, None]:
    gate_up, weight, down, sizes = saved
    # A gradient of rows reads none of them: any of this shape stand in for the product.
    _, pull = jax.vjp(lambda rows: matmul(rows, down, sizes), gate_up[:, : gate_up.shape[1] // 2])
    d_product = pull(d_out)[0]
    d_gate_up, product, d_weight = swiglu.gradient(gate_up, weight, d_product, platform or None)
    _, pull = jax.vjp(lambda down: matmul(product, down, sizes), down)
    return d_gate_up, d_weight, pull(d_out)[0], None


through_swiglu.defvjp(
    lambda matmul, platform, *given: (through_swiglu(matmul, platform, *given), given),
    _through_swiglu_backward,
)


def _local(
    x: Float[Array, 'B T D'],
    choices: Int[Array, 'B T X'],
    weights: Float[Array, 'B T X'],
    gate_up: Float[Array, 'E D two_F'],
    down: Float[Array, 'E _ _'],
    first_expert: Int[Array, ''] | int,
    *,
    num_experts: int,
    capacity_factor: float,
    turned: bool,
    platform: str,
) -> tuple[Float[Array, 'B T D'], Int[Array, '']]:
    """Computes our experts' share of every token, and the number of pairs that they dropped.

    A pair's weight multiplies the product that the last matrix reads, so that its gradient comes
    from that product's: nothing as wide as the stream is kept for each pair (2512.14080).

    Args:
      gate_up: `beside` of the two matrices.
      down: [E F D], or turned [E D F].
    """
    num_chosen, ours = choices.shape[-1], gate_up.shape[0]
    experts = choices.reshape(-1) - first_expert
    valid = (experts >= 0) & (experts < ours) & (choices.reshape(-1) < num_experts)
    capacity = expert_capacity(experts.shape[0], num_experts, capacity_factor)
    p = assign_slots(jnp.where(valid, experts, ours), ours, capacity)
    slot, mode = p.slot.reshape(-1, num_chosen), 'fill' if capacity else 'clip'

    def matmul(x: Array, w: Array, sizes: Array, transposed: bool = False) -> Array:
        if not capacity:
            return grouped_matmul(x, w, sizes, transposed=transposed, platform=platform or None)
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        apart = x.reshape(ours, capacity, -1)
        equation = 'ecf,edf->ecd' if transposed else 'ecd,edf->ecf'
        return jnp.einsum(equation, apart, w, precision=exact).reshape(x.shape[0], -1)

    rows = dispatch(x.reshape(-1, x.shape[-1]), p.source, slot, mode, platform)
    rows = checkpoint_name(rows, 'expert_input')
    wide = jnp.promote_types(x.dtype, jnp.float32)
    inside = checkpoint_name(matmul(rows, gate_up, p.group_sizes), 'gate_up')
    weight = reorder(weights.reshape(-1).astype(wide), p.source, p.slot)
    last = partial(matmul, transposed=turned)
    out = through_swiglu(last, platform, inside, weight, down, p.group_sizes)
    return combine(out, p.source, slot, mode, platform).reshape(x.shape), p.dropped


def beside(gate: Float[Array, 'E D F'], up: Float[Array, 'E D F']) -> Float[Array, 'E D two_F']:
    """Puts the two matrices that read a row beside each other, for one product."""
    return jnp.concatenate([gate, up], axis=-1)


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
    mesh = jax.sharding.get_abstract_mesh()
    local = partial(
        _local,
        num_experts=w_gate.shape[0],
        capacity_factor=capacity_factor,
        platform=platform,
    )
    if mesh.empty or not sharded:
        return local(x, choices, weights, beside(w_gate, w_up), w_down, 0, turned=False)
    # Gathered along its last axis a matrix would arrive in another layout than a kernel reads.
    turned = mesh.shape['fsdp'] > 1

    def on_device(x, choices, weights, gate_up, down):
        gather = lambda a: jax.lax.all_gather(a, 'expert', axis=0, tiled=True)
        first = jax.lax.axis_index('expert') * gate_up.shape[0]
        tokens = gather(x)
        if mesh.shape['expert'] > 1:  # else they are the layer's input
            tokens = checkpoint_name(tokens, 'dispatched')
        y, dropped = local(
            tokens, gather(choices), gather(weights), gate_up, down, first, turned=turned
        )
        y = jax.lax.psum(y, 'tensor')
        y = jax.lax.psum_scatter(y, 'expert', scatter_dimension=0, tiled=True)
        return y, jax.lax.psum(dropped, (*BATCH_AXES, 'context'))

    # Device by device, for the channels of an expert may be split.
    split = spec(('experts', 'embed', 'mlp'))
    gate_up = jax.shard_map(beside, in_specs=(split, split), out_specs=split)(w_gate, w_up)
    tokens = spec(('batch', 'length', 'stream'))
    across, down = (
        PartitionSpec('expert', None, 'tensor'),
        PartitionSpec('expert', 'tensor', None),
    )
    return jax.shard_map(
        on_device,
        in_specs=(tokens, tokens, tokens, across, across if turned else down),
        out_specs=(tokens, PartitionSpec()),
        check_vma=False,
    )(x, choices, weights, gate_up, w_down.swapaxes(1, 2) if turned else w_down)
