"""The decoder: embedding, layers scanned over repeating periods, final norm.

The layers are run by model/stack.py, whose backward pass reads what the memory policy says. Linen's
own scan makes their variables, decodes with a cache, and shows the gates.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.model import depth_average
from helios_jax.model.attention import first_values
from helios_jax.model.block import Layers, LayerStats, Shared, Stream
from helios_jax.model.depth_average import Averaged
from helios_jax.model.gmu import input_eps
from helios_jax.model.hyper import merged, spread
from helios_jax.model.layers import Einsum, Embed, RMSNorm, scaled
from helios_jax.model.loss import project
from helios_jax.model.stack import Stack
from helios_jax.parallel.sharding import constrain


class Transformer(nn.Module):
    """Tokens to final hidden states and, through `unembed`, to logits.

    Parameters are float32. `platform` names the platform to compile for where it is not the one
    that runs ('tpu' when a topology is compiled for on a CPU). `memory` says what becomes of the
    activations that a gradient needs. `few_documents` promises attention that no row of a batch has
    many (`kernels.attention.Setting`).
    """

    model: config.Model
    memory: config.Memory = config.Memory('none')
    platform: str = ''
    few_documents: bool = False

    def setup(self) -> None:
        model = self.model
        dtype = jnp.dtype(model.compute_dtype)
        self.embed = Embed(weights.embedding(model), dtype)
        if model.num_averages:
            row = weights.depth_weights(model)
            init = depth_average.initial(row, model)
            self.depth_weights = self.param(row.name, init, row.shape, jnp.float32)
        if model.prefix_kinds:
            self.prefix = Layers(model, model.prefix_kinds, self.platform)
        self.periods = nn.scan(
            Layers,
            variable_axes={'params': 0, 'router': 0, 'cache': 0, 'intermediates': 0},
            split_rngs={'params': True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=model.num_periods,
            metadata_params={nn.PARTITION_NAME: 'layers'},
            # It would trace the layers once more, and takes interpreted kernels for variables.
            check_constancy_invariants=False,
        )(model, model.period_kinds, self.platform)
        self.final_norm = RMSNorm()
        if not model.tied_embeddings:
            self.unembedding = Einsum(weights.unembedding(model), dtype)

    def __call__(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None = None,
        cache_length: int = 0,
    ) -> tuple[Float[Array, 'B T D'], dict[str, LayerStats]]:
        """Final hidden states in the compute dtype, and the routers' statistics.

        A mutable collection `intermediates` receives the gates of every layer and the size of the
        stream, as `GatedMemoryUnit` describes; the layers then run as under memory.policy='none'.

        Args:
          positions: of each token in its segment, from 0.
          segment_ids: document index per token, 0 is padding; None: one segment a row.
          cache_length: above 0, reads and writes the collection 'cache' of this many positions;
            where none is given, one is made, and positions are indices.
        """
        model = self.model
        x, shared = self.begin(tokens)
        first = len(model.prefix_kinds)
        indices = first + len(model.period_kinds) * jnp.arange(model.num_periods)
        if cache_length or self.is_mutable_collection('intermediates') or self.is_initializing():
            args = (positions, segment_ids, shared, cache_length)
            statistics: dict[str, LayerStats] = {}
            if first:
                x, statistics['prefix'] = self.prefix(x, 0, *args)
            x, statistics['periods'] = self.periods(x, indices, *args)
            x = merged(model, x.x if isinstance(x, Averaged) else x)
            x = self.final_norm(x, input_eps(model, 2 * model.num_layers + 1))
        else:
            variables = {'periods': self.periods.variables, 'norm': self.final_norm.variables}
            if first:
                variables['prefix'] = self.prefix.variables
            stack = Stack(model, self.memory, self.platform, self.few_documents)
            x, statistics = stack(variables, x, indices, positions, segment_ids, shared)
        if self.is_initializing():
            self.unembedding_weight()
        return x, {group: layers for group, layers in statistics.items() if layers}

    def begin(self, tokens: Int[Array, 'B T']) -> tuple[Stream, Shared]:
        """Returns the stream below the first layer, and what every layer reads beside it."""
        model = self.model
        x_0 = constrain(self.embed(tokens), 'batch', 'length', 'stream')
        x: Stream = spread(model, x_0)
        shared = Shared(x_0 if model.gmu.adds_embedding else None)
        if model.num_averages:
            alpha = depth_average.table(model, self.depth_weights)
            x, shared = depth_average.begun(x_0, alpha), shared._replace(depth_weights=alpha)
        if not model.value_residual or self.is_initializing():
            return x, shared
        if model.prefix_kinds:
            layer = nn.unbox(self.prefix.variables['params']['layer_0'])
        else:
            stacked = nn.unbox(self.periods.variables['params']['layer_0'])
            layer = jax.tree.map(lambda weights: weights[0], stacked)
        x_hat = scaled(x_0, layer['attention_norm']['scale'], input_eps(model, 1))
        return x, shared._replace(first_values=first_values(model, layer['attention'], x_hat))

    def unembedding_weight(self) -> Float[Array, 'D V']:
        """float32; V is padded."""
        if self.model.tied_embeddings:
            # Rows are N(0, 1); the head wants N(0, 1/D).
            return self.embed.w.T * self.model.embed_dim**-0.5
        return self.unembedding.w

    def logits(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None = None,
        cache_length: int = 0,
    ) -> Float[Array, 'B T V']:
        """All logits, float32; those of padded vocabulary are −∞. For short inputs: training and
        evaluation go through `loss.cross_entropy`, which never holds them all."""
        hidden, _ = self(tokens, positions, segment_ids, cache_length)
        return project(hidden, self.unembedding_weight(), self.model.vocab_size)


def abstract_variables(model: Transformer) -> Any:
    """Shapes and logical axes (boxed) of a model's variables, without computing anything."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)  # a key itself would wait for the device
    return jax.eval_shape(model.init, key, tokens, tokens)
