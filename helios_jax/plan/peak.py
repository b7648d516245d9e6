"""Bytes of a train step on one device, in closed form, by what they are for.

The peak is the largest of a step's phases. What is alive in each was read from the schedules that
XLA makes for TPUs: see `phases`. `helios plan --validate` holds it against the compiler's figures.
"""

import dataclasses

from helios_jax.arch import buffers, rules
from helios_jax.arch.weights import all_weights, read_in_compute_dtype
from helios_jax.plan.arguments import Arguments, arguments, layer_weights, local
from helios_jax.plan.backward import gathered_bytes, working_bytes
from helios_jax.plan.placement import DTYPE_BYTES, Placement
from helios_jax.plan.saved import SavedTensor, saved_tensors


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device; `host` counts its share of the host's memory."""

    placement: Placement
    arguments: Arguments
    saved: list[SavedTensor]
    gradients: int  # gradients of all layers and the head, of one microbatch
    accumulated: int  # float32 sums of gradients over microbatches, if there are several
    weights_copy: int  # weights of all layers in the compute dtype, cast once a step
    working: int  # one layer's backward pass: recomputed tensors, their gradients
    gathered: int  # one layer's weights, whole, and what collectives hold beside them
    loss: int  # a chunk's logits and their gradient, the gathered tokens, the gradient of the head
    prefetched: int  # saved tensors of the host's that are on their way back
    fetched_early: int  # moments of the host's that belong to no layer
    streamed: int  # state of the host's that is being updated

    @property
    def saved_device(self) -> int:
        return sum(s.num_bytes for s in self.saved if s.place == 'device')

    @property
    def saved_host(self) -> int:
        return sum(s.num_bytes for s in self.saved if s.place == 'host')

    @property
    def arguments_device(self) -> int:
        return self.arguments.on_device(self.placement)

    @property
    def host(self) -> int:
        return self.saved_host + self.arguments.on_host(self.placement)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes beyond the arguments in each phase of a step.

        In the loss no layer has a gradient yet; in the backward pass the stacks of all layers'
        gradients are there from its first step on, beside all that was saved; in the update nothing
        is left but gradients. The copies of the weights in the compute dtype live as long as the
        two passes. XLA fetches moments that come from the host whole, not layer by layer, before
        the backward pass has ended.
        """
        passes = self.weights_copy + self.saved_device
        accumulated = self.accumulated
        return {
            'loss': passes + self.loss + accumulated,
            'backward': passes + self.gradients + accumulated + self.working + self.gathered
            + self.prefetched + self.fetched_early,
            'update': (accumulated or self.gradients) + self.streamed,
        }  # fmt: skip

    @property
    def temporary(self) -> int:
        return max(self.phases.values())

    @property
    def peak(self) -> int:
        """Bytes that have to fit: the arguments, and the largest phase beside them."""
        return self.arguments_device + self.temporary

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])


def step_memory(placement: Placement) -> StepMemory:
    """Counts the bytes of a train step of the config on its mesh.

    Raises:
      UserError: the mesh does not divide a weight, or the policy is still to be resolved.
    """
    saved = saved_tensors(placement)
    return StepMemory(
        placement=placement,
        arguments=arguments(placement),
        saved=saved,
        gradients=_gradients(placement, accumulated=False),
        accumulated=_gradients(placement, accumulated=True),
        weights_copy=_weights_copy(placement),
        working=working_bytes(placement),
        gathered=gathered_bytes(placement),
        loss=_loss(placement),
        # One step's tensors have arrived, the next step's are on their way.
        prefetched=2 * sum(s.layer_bytes for s in saved if s.place == 'host'),
        fetched_early=_fetched_early(placement),
        streamed=_streamed(placement),
    )


def _gradients(placement: Placement, *, accumulated: bool) -> int:
    """Bytes of all gradients but an untied embedding's, which comes when little else is left.

    Float32, or the compute dtype where the model reads a copy in that; sums are float32.
    """
    tied, total = placement.config.model.tied_embeddings, 0
    if accumulated and placement.config.train.microbatches == 1:
        return 0
    for weight in all_weights(placement.config.model):
        narrow = read_in_compute_dtype(weight.axes) and not accumulated
        if tied or weight.name != 'embed.w':
            total += (placement.dtype_bytes if narrow else 4) * local(placement, weight)
    return total


def _weights_copy(placement: Placement) -> int:
    """Bytes of compute-dtype copies of weights, which live through both passes."""
    model, total = placement.config.model, 0
    on_host = placement.config.memory.parameters == 'host'
    for weight in all_weights(model):
        if read_in_compute_dtype(weight.axes) and placement.dtype_bytes < 4:
            total += placement.dtype_bytes * local(placement, weight)
        elif on_host:
            total += 4 * local(placement, weight)
    return total


def _loss(placement: Placement) -> int:
    """Bytes of model/loss.py: float32 logits, their compute-dtype gradient, gathered tokens."""
    model, cfg = placement.config.model, placement.config
    rows, T = placement.microbatch_rows, cfg.data.row_length
    chunks = buffers.loss_chunks(rows, T, model.padded_vocab_size, placement.num_devices)
    tokens = rows // rules.shards(placement, 'loss_batch') * T // chunks
    vocab = model.padded_vocab_size // rules.shards(placement, 'unembed_vocab')
    logits = tokens * vocab * (4 + placement.dtype_bytes)
    head = model.embed_dim * vocab * (4 + placement.dtype_bytes)
    stream = 2 * placement.local_tokens * model.embed_dim * placement.dtype_bytes
    return logits + head + 2 * tokens * model.embed_dim * placement.dtype_bytes + stream


def _fetched_early(placement: Placement) -> int:
    if placement.config.memory.optimizer == 'device':
        return 0
    return _moments_bytes(placement) * sum(_alone(placement))


def _moments_bytes(placement: Placement) -> int:
    """Bytes of one parameter's moments and of its running average."""
    cfg = placement.config
    return 2 * DTYPE_BYTES[cfg.optimizer.moments_dtype] + (4 if cfg.train.ema else 0)


def _alone(placement: Placement) -> list[int]:
    """Lists the elements of each array that is not stacked layers."""
    return [
        local(placement, w) for w in all_weights(placement.config.model) if w.axes[0] != 'layers'
    ]


def _streamed(placement: Placement) -> int:
    """Device bytes for a state on the host.

    The layer being updated and the one being fetched, or the largest array that is no layer's.
    """
    memory = placement.config.memory
    each = (4 if memory.parameters == 'host' else 0) + (
        _moments_bytes(placement) if memory.optimizer == 'host' else 0
    )
    layers = [2 * sum(local(placement, w) for w in ws) for ws in layer_weights(placement)]
    return each * max([*layers, *_alone(placement)])
