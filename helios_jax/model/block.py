"""One layer, attention and feed-forward each behind a norm and joined by a GMU; a run of them.

With `gmu.kind=hyper` layers carry n streams side by side, else one (n = 1).
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from helios_jax import config
from helios_jax.model.attention import Attention
from helios_jax.model.depth_average import Averaged, joined
from helios_jax.model.gmu import GatedMemoryUnit, Norm, input_eps
from helios_jax.model.hyper import HyperConnection
from helios_jax.model.layers import RMSNorm, float32_or_wider, scaled
from helios_jax.model.moe import MixtureOfExperts, Stats, SwiGLU
from helios_jax.parallel.sharding import constrain

Stream = Float[Array, 'B T nD'] | Averaged
LayerStats = dict[str, Stats]  # name of the layer in its period → what its router reports


class Shared(NamedTuple):
    """Arrays that every layer reads beside the stream; None where the config has no use for one."""

    x_0: Float[Array, 'B T D'] | None = None  # what the embedding gave (gmu.embedding)
    first_values: Float[Array, 'B T K H'] | None = None  # those of the first layer (value_residual)
    depth_weights: Float[Array, 'L1 A'] | None = None  # of averages over depth (gmu.dwa)


NOTHING = Shared()


@jax.custom_vjp
def probe(x: Array, number: Float[Array, '']) -> Array:
    """Returns x; the gradient of the number, whatever that is, is Σ of squares of x's."""
    return x


probe.defvjp(
    lambda x, number: (x, number),
    lambda number, dx: (dx, jnp.sum(jnp.square(float32_or_wider(dx))).astype(number.dtype)),
)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and joined by a GMU."""

    model: config.Model
    kind: str
    platform: str = ''
    residuals: str = ''  # what attention keeps q, k and v as: '' | fp8 | int8
    backward_parts: int = 0  # of the MLP and the gates; 0: nothing is recomputed
    few_documents: bool = False  # of each row, counted by the caller

    @nn.compact
    def __call__(
        self,
        x: Stream,
        index: Any,
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None,
        shared: Shared = NOTHING,
        cache_length: int = 0,
    ) -> tuple[Stream, Stats | None]:
        """Runs layer `index` (from 0; may be traced) on the stream x."""
        model, parts = self.model, self.backward_parts
        sums = None
        if isinstance(x, Averaged):
            x, sums = x
        x = constrain(x, 'batch', 'length', 'streams')
        window = model.window if self.kind.endswith('window') else 0

        sublayer = 2 * index + 1
        connect = partial(HyperConnection, model, again=parts > 0, platform=self.platform)
        h, write = x, None
        if model.gmu.kind == 'hyper':
            h, write = connect('attention', name='attention_gmu')(x, sublayer)
        x_hat = checkpoint_name(scaled(h, *self.norm('attention', sublayer)), 'attention_input')
        how = self.platform, self.residuals, self.few_documents
        attention = Attention(model, window, *how, name='attention')
        update = attention(x_hat, positions, segment_ids, cache_length, shared.first_values)
        update = checkpoint_name(update, 'attention_update')
        gate = partial(GatedMemoryUnit, model, backward_parts=parts, platform=self.platform)
        norm = self.norm('mlp', sublayer + 1)
        if write:
            x = self.probed('attention', write(update))
            h, write = connect('mlp', name='mlp_gmu')(x, sublayer + 1)
            x_hat = scaled(h, *norm)
        else:
            gated = gate(name_prefix='attention', name='attention_gmu')
            # Of a stream that is probed, what the norm reads must be behind the probe.
            behind = None if self.has_variable('probes', 'attention') else norm
            x, x_hat = gated(x, x_hat, update, sublayer, behind, shared.x_0)
            if behind is None:
                x = self.probed('attention', x)
                x_hat = scaled(x, *norm)

        x_hat = checkpoint_name(x_hat, 'mlp_input')
        stats = None
        if self.kind.startswith('moe'):
            update, stats = MixtureOfExperts(model, self.platform, name='moe')(x_hat, segment_ids)
        else:
            mlp = SwiGLU(model, model.mlp_dim, parts, name='mlp')
            update = mlp(x_hat)
        update = checkpoint_name(update, 'mlp_update')
        if write:
            return self.probed('mlp', write(update)), stats
        gated = gate(name_prefix='mlp', name='mlp_gmu')
        x, _ = gated(x, x_hat, update, sublayer + 1, x_0=shared.x_0)
        x = self.probed('mlp', x)
        if sums is not None:
            assert shared.depth_weights is not None, 'gmu.dwa needs the weights'
            return joined(model, sums, x, index, shared.depth_weights), stats
        return x, stats

    @nn.nowrap
    def probed(self, name: str, x: Array) -> Array:
        """Returns the stream behind a sublayer.

        With a number `name` in the collection `probes` its gradient becomes Σ (dloss/dx)².
        """
        if not self.has_variable('probes', name):
            return x
        return probe(x, self.get_variable('probes', name))

    @nn.nowrap
    def norm(self, name: str, sublayer: Any) -> Norm:
        """Reads the norm in front of a sublayer, which counts from 1 (2l − 1 and 2l in layer l)."""
        scale = RMSNorm(name=f'{name}_norm').scale(self.model.embed_dim)
        if self.model.norm_scale == 'depth':
            layer = jnp.asarray((sublayer + 1) // 2, jnp.float32)
            scale = scale * jax.lax.rsqrt(layer)
        return Norm(scale, input_eps(self.model, sublayer))


class Layers(nn.Module):
    """Consecutive layers of the given kinds."""

    model: config.Model
    kinds: tuple[str, ...]
    platform: str

    @nn.compact
    def __call__(
        self,
        x: Stream,
        first_index: Any,
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'] | None,
        shared: Shared = NOTHING,
        cache_length: int = 0,
    ) -> tuple[Stream, LayerStats]:
        stats = {}
        for i, kind in enumerate(self.kinds):
            name = f'layer_{i}'
            layer = Block(self.model, kind, self.platform, name=name)
            x, reported = layer(x, first_index + i, positions, segment_ids, shared, cache_length)
            if reported is not None:
                stats[name] = reported
        return x, stats
