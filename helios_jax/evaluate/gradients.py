"""Gradient of the loss at every sublayer: in the stream behind it, and in its weights.

The model runs once forward and once backward on a batch, and saves activations as its memory policy
says. Squares of a stream's gradient are summed up where the backward pass makes it, so that no two
sublayers' exist together.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from helios_jax import config
from helios_jax.data.pipeline import Batch
from helios_jax.evaluate.sublayers import NAMES, in_order
from helios_jax.model.block import Block
from helios_jax.model.layers import float32_or_wider
from helios_jax.model.loss import cross_entropy, with_targets
from helios_jax.model.stack import Stack
from helios_jax.model.transformer import Transformer
from helios_jax.parallel.sharding import constrain


def figures(
    model: Transformer,
    variables: PyTree,
    batch: Batch,
    *,
    documents_apart: bool,
    compiler_options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Returns a dict for each sublayer, bottom first, with its `layer`, from 1, and `sublayer`.

    `stream_gradient` is the root mean square, over tokens and channels, of the gradient of the
    summed loss in the stream behind the sublayer; `weights_gradient` the norm of the gradient of
    the mean loss in all of its weights, those of its norms and gate among them. The loss is the
    cross-entropy of the batch's targets, in nats. Neither grows with the number of rows.

    Args:
      model: its `memory` is the policy.
      variables: 'params', and 'router' for a mixture of experts.
      batch: global arrays, on the mesh that is set.
      documents_apart: whether attention keeps to segments; False for rows that are one stream.
      compiler_options: those that the program is compiled with.
    """
    sizes = partial(
        sizes_of_batch, model=model.model, memory=model.memory, documents_apart=documents_apart
    )
    found = jax.jit(sizes, compiler_options=dict(compiler_options))(variables, batch)
    return in_order(model.model, jax.device_get(found))


def sizes_of_batch(
    variables: PyTree,
    batch: Batch,
    *,
    model: config.Model,
    memory: config.Memory,
    documents_apart: bool,
) -> PyTree:
    """Computes the figures: group and name of a layer → sublayer → figure, stacked over repeats."""
    batch, targets, weights = with_targets(batch)
    params, real = variables['params'], batch.segment_ids > 0
    repeats = {'prefix': (), 'periods': (model.num_periods,)}
    layers = {group: params[group] for group in repeats if group in params}
    probes = {
        group: {name: dict.fromkeys(NAMES, jnp.zeros(repeats[group])) for name in own}
        for group, own in layers.items()
    }

    def loss(layers: PyTree, probes: PyTree) -> Array:
        apply: Any = partial(Transformer(model).apply, {**variables, 'params': params | layers})
        x, shared = apply(batch.tokens, method='begin')
        given: dict[str, Any] = {
            group: {
                'params': {
                    name: {'params': weights, 'probes': probes[group][name]}
                    for name, weights in own.items()
                },
                'router': variables.get('router', {}).get(group, {}),
            }
            for group, own in layers.items()
        }
        given['norm'] = {'params': params['final_norm']}
        first, period = len(model.prefix_kinds), len(model.period_kinds)
        # Each layer once in the program: it runs only once.
        hidden, _ = Probed(model, dataclasses.replace(memory, layers='scan'))(
            given,
            x,
            first + period * jnp.arange(model.num_periods),
            batch.positions,
            batch.attention_segments(documents_apart),
            shared,
        )
        head = apply(method='unembedding_weight')
        return cross_entropy(hidden, head, targets, weights, model.vocab_size).total

    by_layers, by_probes = jax.grad(loss, argnums=(0, 1))(layers, probes)
    num_targets = jnp.maximum(weights.sum(), 1)

    def sizes(group: str, layer: str, name: str) -> dict[str, Array]:
        stream = by_probes[group][layer][name] / (real.sum() * model.streams_dim)
        of_weights = squares(by_layers[group][layer], name, stacked=len(repeats[group]))
        return {
            'stream_gradient': jnp.sqrt(stream),
            'weights_gradient': jnp.sqrt(of_weights) / num_targets,
        }

    found = {
        group: {layer: {name: sizes(group, layer, name) for name in NAMES} for layer in own}
        for group, own in layers.items()
    }
    # Every process reads all of them.
    return jax.tree.map(lambda a: constrain(a, *['whole'] * a.ndim), found)


@dataclasses.dataclass(frozen=True)
class Probed(Stack):
    """Layers whose parameters have the probes of their two sublayers beside them."""

    def run(self, block: Block, variables: Any, *arguments: Any) -> Any:
        return block.apply(variables | variables['params'], *arguments)


def squares(layer: Mapping[str, Any], sublayer: str, stacked: int) -> Array:
    """Sums the squares of a sublayer's part of a layer's gradient, but not over `stacked` axes."""
    parts = [part for name, part in layer.items() if owner(name) == sublayer]
    leaves = [float32_or_wider(leaf) for leaf in jax.tree.leaves(parts)]
    sums = [jnp.sum(leaf**2, axis=range(stacked, leaf.ndim)) for leaf in leaves]
    return jnp.sum(jnp.stack(sums), axis=0)


def owner(module: str) -> str:
    """Names the sublayer of a layer that a module of it belongs to: attention_norm, moe, …"""
    attention, mlp = NAMES
    return attention if module.startswith(attention) else mlp
