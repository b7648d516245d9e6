"""Bytes of a step's arguments: parameters, optimizer state, their average, biases, the batch."""

from typing import NamedTuple

from helios_jax.arch import rules
from helios_jax.arch.weights import Weight, all_weights, muon_sides, router_biases
from helios_jax.plan.placement import DTYPE_BYTES, Placement


class Arguments(NamedTuple):
    """Bytes on one device, or in its share of the host's memory where the config says so."""

    parameters: int
    optimizer: int
    ema: int  # running average of the parameters, which lies where the moments do
    router: int
    batch: int

    def on_device(self, placement: Placement) -> int:
        return sum(self) - self.on_host(placement)

    def on_host(self, placement: Placement) -> int:
        memory = placement.config.memory
        host = self.parameters if memory.parameters == 'host' else 0
        return host + (self.optimizer + self.ema if memory.optimizer == 'host' else 0)


def arguments(placement: Placement) -> Arguments:
    """Counts the bytes of a train step's arguments.

    Raises:
      UserError: the mesh does not divide a weight.
    """
    weights = all_weights(placement.config.model)
    for weight in weights:
        rules.check(weight.name.replace('.', '/'), weight.shape, weight.axes, placement)
    moment = DTYPE_BYTES[placement.config.optimizer.moments_dtype]
    moments = sum(_num_moments(placement, weight) * local(placement, weight) for weight in weights)
    rows = placement.config.train.batch_rows // rules.shards(placement, 'batch')
    # tokens, segment ids and positions in int32, the loss mask in bool; a row's number of bytes
    batch = rows * (placement.local_length * 13 + 4)
    parameters = 4 * sum(local(placement, weight) for weight in weights)
    return Arguments(
        parameters=parameters,
        optimizer=moment * moments,
        ema=parameters if placement.config.train.ema else 0,
        router=4 * sum(local(placement, bias) for bias in router_biases(placement.config.model)),
        batch=batch,
    )


def local(placement: Placement, weight: Weight) -> int:
    """Number of a weight's elements on one device."""
    return placement.elements(weight.shape, weight.axes)


def _num_moments(placement: Placement, weight: Weight) -> int:
    """Number of a weight's moments: AdamW keeps two, Muon one of each of its matrices."""
    return 1 if placement.config.optimizer.name == 'muon' and muon_sides(weight.axes) else 2


def layer_weights(placement: Placement) -> list[list[Weight]]:
    """Lists the weights of each layer of the period, without their stacking axis."""
    found: dict[str, list[Weight]] = {}
    for weight in all_weights(placement.config.model):
        group, _, rest = weight.name.partition('.')
        if group == 'periods':
            one = weight._replace(shape=weight.shape[1:], axes=weight.axes[1:])
            found.setdefault(rest.split('.')[0], []).append(one)
    return list(found.values())
