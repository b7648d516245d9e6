"""Figures of every sublayer: its gate, the stream below it, and the load of its experts.

The model runs once on a batch, without a gradient. What a gate shows is summed up where its layer
runs, so that the gates of one sublayer exist at a time: a deep model takes no more memory for it
than a shallow one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from helios_jax import config
from helios_jax.data.pipeline import Batch
from helios_jax.model.block import Block
from helios_jax.model.loss import with_targets
from helios_jax.model.stack import Stack
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import compiler_options
from helios_jax.parallel.sharding import constrain

NAMES = ('attention', 'mlp')  # sublayers of a layer, the lower one first
BINS = 10  # that cut [0, 1] for a gate's histogram
SHUT, OPEN = 0.01, 0.99  # a gate below the one or above the other is saturated
BAND = (0.1, 0.9)  # quantiles of a gate
HALVINGS = 20  # of [0, 1], by which a quantile is found: to 1e-6


def figures(
    model: Transformer, variables: PyTree, batch: Batch, *, documents_apart: bool
) -> dict[str, Any]:
    """Returns `tokens`, how many were looked at, and `sublayers`, one dict each, bottom first.

    Each has its `layer`, from 1, its `sublayer` (attention or mlp) and `stream_rms`, the root mean
    square of the stream below it. With a gate there are `gate_mean`, `gate_low` and `gate_high`
    (BAND), `gate_saturated`, the share below SHUT or above OPEN, and `gate_histogram`, the shares
    in BINS equal parts of [0, 1]; all are over tokens and channels. With a factor in the gate's
    place there is `factor_mean`, and above experts `expert_load`, each one's share of the choices.

    Args:
      variables: 'params', and 'router' for a mixture of experts.
      batch: global arrays, on the mesh that is set.
      documents_apart: whether attention keeps to segments; False for rows that are one stream.
    """
    found = jax.device_get(
        summing()(variables, batch, model=model.model, documents_apart=documents_apart)
    )
    return {'tokens': int(found['tokens']), 'sublayers': in_order(model.model, found['layers'])}


@functools.cache
def summing() -> Callable[..., PyTree]:
    """`sums_of_batch`, compiled as this machine's chips want it."""
    options = compiler_options.resolve(jax.local_devices()[0], compiler_options.EVALUATION)
    names = ('model', 'documents_apart')
    return jax.jit(sums_of_batch, static_argnames=names, compiler_options=options)


def sums_of_batch(
    variables: PyTree, batch: Batch, *, model: config.Model, documents_apart: bool
) -> PyTree:
    """Computes the figures: group and name of a layer → sublayer → figure, stacked over repeats."""
    batch, _, _ = with_targets(batch)  # in the order of tokens that the mesh wants
    real = batch.segment_ids > 0
    begun: Any = Transformer(model).apply(variables, batch.tokens, method='begin')
    first, period = len(model.prefix_kinds), len(model.period_kinds)
    groups: dict[str, Any] = {
        group: {name: tree[group] for name, tree in variables.items() if group in tree}
        for group in (['prefix'] if first else []) + ['periods']
    }
    groups['norm'] = {'params': variables['params']['final_norm']}
    # Each layer once in the program: it runs only once.
    stack = Observed(model, config.Memory('none', layers='scan'), real=real)
    _, layers = stack(
        groups,
        begun[0],
        first + period * jnp.arange(model.num_periods),
        batch.positions,
        batch.attention_segments(documents_apart),
        begun[1],
    )
    found = {'tokens': real.sum(), 'layers': layers}
    # Every process reads all of them.
    return jax.tree.map(lambda a: constrain(a, *['whole'] * a.ndim), found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed(Stack):
    """Layers that give figures of their sublayers where others give their router's statistics."""

    real: Bool[Array, 'B T']  # tokens that are no padding

    def run(self, block: Block, variables: Any, *arguments: Any) -> Any:
        (x, stats), seen = block.apply(variables, *arguments, mutable=['intermediates'])
        units = seen['intermediates']
        found = {name: self.summary(units[f'{name}_gmu']) for name in NAMES}
        if stats is not None:
            found['mlp']['expert_load'] = stats.load / stats.load.sum()
        return x, found

    def summary(self, left: Mapping[str, tuple[Any]]) -> dict[str, Array]:
        """Sums up what a unit left in the collection `intermediates`."""
        gmu, weights = self.model.gmu, self.real / self.real.sum()
        mean = lambda values: jnp.sum(values.mean(axis=-1) * weights)
        found = {'stream_rms': jnp.sqrt(mean(left['stream_rms'][0][..., None] ** 2))}
        if gmu.kind in ('residual', 'hyper'):
            return found
        (gate,) = left['gate']
        if not gmu.has_gate:
            return found | {'factor_mean': gate.mean()}
        opened = jnp.broadcast_to(gate, (*self.real.shape, gate.shape[-1]))
        part = jnp.minimum((opened * BINS).astype(jnp.int32), BINS - 1)
        low, high = (quantile(lambda g: mean(opened <= g), wanted) for wanted in BAND)
        return found | {
            'gate_mean': mean(opened),
            'gate_low': low,
            'gate_high': high,
            'gate_saturated': mean((opened < SHUT) | (opened > OPEN)),
            'gate_histogram': jax.vmap(lambda n: mean(part == n))(jnp.arange(BINS)),
        }


def quantile(share: Callable[[Array], Array], wanted: float) -> Float[Array, '']:
    """Finds the least of [0, 1] at which `share`, which grows, reaches what is wanted.

    Halving needs no sorted copy of what is counted, and no device needs another's part of it.
    """

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        reached = share(middle) >= wanted
        return jnp.where(reached, ends[0], middle), jnp.where(reached, middle, ends[1])

    return jax.lax.fori_loop(0, HALVINGS, halve, (jnp.zeros(()), jnp.ones(())))[1]


def in_order(model: config.Model, layers: PyTree) -> list[dict[str, Any]]:
    """Lists the sublayers, bottom first, from group and layer → sublayer → figure, stacked."""
    first, found = len(model.prefix_kinds), []
    for index in range(model.num_layers):
        if index < first:
            own = layers['prefix'][f'layer_{index}']
        else:
            repeat, place = divmod(index - first, len(model.period_kinds))
            own = jax.tree.map(lambda a, n=repeat: a[n], layers['periods'][f'layer_{place}'])
        found += [
            {'layer': index + 1, 'sublayer': name}
            | {figure: value.tolist() for figure, value in own[name].items()}
            for name in NAMES
        ]
    return found
