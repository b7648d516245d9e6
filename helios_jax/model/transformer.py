"""The decoder: embedding, layers scanned over repeating periods, final norm."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.memory import policy, store
from helios_jax.memory.proof import has_host_memory
from helios_jax.model.attention import Attention
from helios_jax.model.gmu import GatedMemoryUnit, input_eps
from helios_jax.model.layers import Einsum, Embed, RMSNorm
from helios_jax.model.loss import project
from helios_jax.model.moe import MixtureOfExperts, Stats, SwiGLU
from helios_jax.parallel.sharding import constrain

LayerStats = dict[str, Stats]  # name of the layer in its period → what its router reports


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and joined by a GMU."""

    model: config.Model
    kind: str
    platform: str = ''
    residuals: str = ''  # what attention keeps q, k and v as: '' | fp8 | int8
    backward_parts: int = 0  # of the MLP and the gates; 0: nothing is recomputed

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        index: Any,
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None,
        cache_length: int = 0,
    ) -> tuple[Float[Array, 'B T D'], Stats | None]:
        """Layer `index` (from 0; may be traced) of the stream x."""
        model = self.model
        x = constrain(x, 'batch', 'length', 'stream')
        window = model.window if self.kind.endswith('window') else 0

        sublayer = 2 * index + 1
        x_hat = RMSNorm(name='attention_norm')(x, input_eps(model, sublayer))
        x_hat = checkpoint_name(x_hat, 'attention_input')
        attention = Attention(model, window, self.platform, self.residuals, name='attention')
        update = attention(x_hat, positions, segment_ids, cache_length)
        update = checkpoint_name(update, 'attention_update')
        gated = GatedMemoryUnit(model, 'attention', self.backward_parts, name='attention_gmu')
        x = gated(x, x_hat, update, sublayer)
        x = constrain(x, 'batch', 'length', 'stream')

        sublayer = sublayer + 1
        x_hat = RMSNorm(name='mlp_norm')(x, input_eps(model, sublayer))
        x_hat = checkpoint_name(x_hat, 'mlp_input')
        stats = None
        if self.kind.startswith('moe'):
            update, stats = MixtureOfExperts(model, name='moe')(x_hat, segment_ids)
        else:
            mlp = SwiGLU(model.embed_dim, model.mlp_dim, self.backward_parts, name='mlp')
            update = mlp(x_hat)
        update = checkpoint_name(update, 'mlp_update')
        gated = GatedMemoryUnit(model, 'mlp', self.backward_parts, name='mlp_gmu')
        x = gated(x, x_hat, update, sublayer)
        return constrain(x, 'batch', 'length', 'stream'), stats


class Layers(nn.Module):
    """Consecutive layers of the given kinds."""

    model: config.Model
    kinds: tuple[str, ...]
    platform: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        first_index: Any,
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None,
        cache_length: int = 0,
    ) -> tuple[Float[Array, 'B T D'], LayerStats]:
        stats = {}
        for i, kind in enumerate(self.kinds):
            name = f'layer_{i}'
            layer = Block(self.model, kind, self.platform, name=name)
            x, reported = layer(x, first_index + i, positions, segment_ids, cache_length)
            if reported is not None:
                stats[name] = reported
        return x, stats


class Transformer(nn.Module):
    """Tokens to final hidden states and, through `unembed`, to logits.

    Parameters are float32. `platform` names the platform to compile for where it is not the one
    that runs ('tpu' when a topology is compiled for on a CPU). `memory` says what becomes of the
    activations that a gradient needs.
    """

    model: config.Model
    memory: config.Memory = config.Memory('none')
    platform: str = ''

    def setup(self) -> None:
        model = self.model
        dtype = jnp.dtype(model.compute_dtype)
        self.embed = Embed(weights.embedding(model), dtype)
        if model.prefix_kinds:
            self.prefix = Layers(model, model.prefix_kinds, self.platform)
        self.periods = nn.scan(
            Layers,
            variable_axes={'params': 0, 'router': 0, 'cache': 0, 'intermediates': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
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

        A mutable collection `intermediates` receives the gates of every layer, as
        `GatedMemoryUnit` describes; the layers then run as under memory.policy='none'.

        Args:
          positions: of each token in its segment, from 0.
          segment_ids: document index per token, 0 is padding; None: one segment a row.
          cache_length: above 0, reads and writes the collection 'cache' of this many positions.
        """
        model = self.model
        x = constrain(self.embed(tokens), 'batch', 'length', 'stream')
        args = (positions, segment_ids, cache_length)
        reported: dict[str, LayerStats] = {}
        first = len(model.prefix_kinds)
        indices = first + len(model.period_kinds) * jnp.arange(model.num_periods)
        eps = input_eps(model, 2 * model.num_layers + 1)
        looked_at = self.is_mutable_collection('intermediates') or self.is_initializing()
        if self.memory.policy == 'none' or cache_length or looked_at:
            if first:
                x, reported['prefix'] = self.prefix(x, 0, *args)
            x, reported['periods'] = self.periods(x, indices, *args)
            x = self.final_norm(x, eps)
        else:
            x, reported = self.stored(x, indices, positions, segment_ids, eps)
        if self.is_initializing():
            self.unembedding_weight()
        return x, {group: stats for group, stats in reported.items() if stats}

    @nn.nowrap
    def stored(
        self, x: Array, indices: Array, positions: Array, segment_ids: Array | None, eps: Any
    ) -> tuple[Array, dict[str, LayerStats]]:
        """The layers and the last norm, whose gradient reads what `memory` says."""
        model, table = self.model, policy.actions(self.memory)
        form, num_parts = policy.kernel_form(table), self.memory.backward_parts
        where: dict[str, Any] = {'table': table, 'host': has_host_memory(self.platform)}
        reported: dict[str, LayerStats] = {}

        def layer(kind: str, index: Any, router: Any, params: Any, x: Array, *args: Any) -> Any:
            block = Block(model, kind, self.platform, form, num_parts, parent=None)
            return block.apply({'params': params, 'router': router}, x, index, *args)

        def scanned(i: int, kind: str, params: Any, x: Array, period: Any, *args: Any) -> Any:
            first_index, router = period
            return layer(kind, first_index + i, router, params, x, *args)

        args = (positions, segment_ids)
        for i, kind in enumerate(model.prefix_kinds):
            params, router = parts(self.prefix, i)
            x, stats = store.apply(
                lambda params, x, router, *args, i=i, kind=kind: layer(
                    kind, i, router, params, x, *args
                ),
                params=params, x=x, others=(router, *args), input_name='block_input', **where,
            )  # fmt: skip
            if stats is not None:
                reported.setdefault('prefix', {})[f'layer_{i}'] = stats
        period = range(len(model.period_kinds))
        params, routers = zip(*(parts(self.periods, i) for i in period), strict=True)
        x, reports = store.scan(
            [partial(scanned, i, kind) for i, kind in enumerate(model.period_kinds)],
            params=params, x=x, scanned=[(indices, router) for router in routers], others=args,
            input_name='block_input', **where,
        )  # fmt: skip
        stats = {f'layer_{i}': report for i, report in enumerate(reports) if report is not None}
        reported['periods'] = stats
        norm = lambda params, x: RMSNorm(parent=None).apply({'params': params}, x, eps)  # noqa: E731
        params = self.final_norm.variables['params']
        x = store.apply(norm, params=params, x=x, others=(), input_name='final_hidden', **where)
        return x, reported

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


def parts(layers: nn.Module, i: int) -> tuple[Any, Any]:
    """(parameters, router) of layer i of bound layers."""
    name, variables = f'layer_{i}', layers.variables
    return variables['params'][name], variables.get('router', {}).get(name, {})


def abstract_variables(model: Transformer) -> Any:
    """Shapes and logical axes (boxed) of a model's variables, without computing anything."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)  # a key itself would wait for the device
    return jax.eval_shape(model.init, key, tokens, tokens)
