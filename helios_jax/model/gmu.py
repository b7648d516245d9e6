"""Gated Memory Units, which replace the residual connection.

    g = σ(W_b W_x x̂ + b)        y = [λ] x + g ⊙ (û − x) [+ α x₀]

x is the stream, x̂ the sublayer's normalised input, u its output, û = RMSNorm(u) with a learnt
scale. The gate may see the output, as W_u ū, too or alone (`gmu.gate_input`). b starts at −ln l
for the l-th sublayer, so g = 1/(l+1) and the stream is the running mean of the embedding and of
every output so far. RMSNorm reads only the stream's direction, so with u instead of û the network
starts as exactly the pre-norm residual network, and the gates learn from there. The price is two
skinny matmuls a sublayer. With `gmu.embedding` what the embedding gave, x₀, is added behind every
sublayer, times a learnt number that starts at 0; with `gmu.stream_scale` another, that starts at 1,
multiplies the stream.

Descends from Highway Networks (1505.00387), GTrXL (1910.06764), ReZero (2003.04887), LayerScale
(2103.17239), Hyper-Connections (2409.19606) and Review Residuals (2606.31859). Another GMU, which
gates a memory shared between SSM layers, is unrelated.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from helios_jax import config
from helios_jax.arch.weights import Rows, Weight
from helios_jax.arch.weights import gmu as gmu_rows
from helios_jax.kernels import gated_norm
from helios_jax.memory.parts import Cut, Parts, in_parts
from helios_jax.model.layers import (
    Einsum,
    RMSNorm,
    float32_or_wider,
    partitioned,
    scaled,
)
from helios_jax.model.mixing import (
    INTERPOLATING,
    Gate,
    Weights,
    gate_of,
    mix,
    normalized_product,
    recomputed,
)
from helios_jax.parallel.sharding import constrain, sharing, spec


def follows_stream(gmu: config.GMU) -> bool:
    """True if at initialisation the stream is the residual stream ÷ the sublayer's index."""
    return gmu.kind == 'convex' and gmu.bias == 'depth'


def input_eps(model: config.Model, index: Any) -> Any:
    """Eps of the norm that reads the stream below sublayer `index` (1 … 2L; 2L+1 is the last norm).

    The stream is 1/index of the residual stream there, and eps follows its square; with a fixed eps
    the two networks drift apart with depth.
    """
    return model.norm_eps / index**2 if follows_stream(model.gmu) else model.norm_eps


class Norm(NamedTuple):
    """Norm that reads the stream behind a unit."""

    scale: Float[Array, 'D']
    eps: Any


def operands(
    platform: str,
    x: Array,
    update: Array,
    gate: Gate,
    scale: Array | None,
    behind: Norm | None,
    more: bool,
) -> gated_norm.MixOperands | None:
    """Returns the operands of the platform's kernel; None for forms of the unit that it lacks.

    A plain sum XLA makes where it makes the update; what else the kernel lacks is logged.

    Args:
      more: True: the unit adds the embedding or scales the stream.
    """
    D = x.shape[-1]
    if gate.vector is None and scale is None:
        return None
    if more:
        reason = 'the kernel has no model.gmu.embedding and no model.gmu.stream_scale.'
        gated_norm.log_refusal(platform, reason)
        return None
    if gate.vector is not None and gate.vector.size != D:
        gated_norm.log_refusal(platform, 'the kernel has no gate that serves several channels.')
        return None
    vector = None if gate.vector is None else gate.vector.reshape(D)
    eps = behind and jnp.asarray(behind.eps, jnp.float32)
    next_scale = behind and behind.scale
    return gated_norm.MixOperands(x, update, gate.hidden, gate.out, vector, scale, next_scale, eps)


def mixed_by_kernel(
    form: gated_norm.Mix, platform: str, given: gated_norm.MixOperands
) -> tuple[Array, Array | None]:
    """Calls the kernel on each device's tokens."""
    kernel = partial(gated_norm.gated_norm, form, platform)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(given)
    tokens, whole = spec(('batch', 'length', 'stream')), PartitionSpec()
    per_token = ('x', 'update', 'hidden')
    specs: dict[str, Any] = dict.fromkeys(given._fields)
    specs |= {name: tokens if name in per_token else whole for name in given.arrays()}
    results = tokens, tokens if given.next_scale is not None else None
    return jax.shard_map(
        kernel,
        in_specs=(gated_norm.MixOperands(**specs),),
        out_specs=results,
        check_vma=False,
    )(given)


class GatedMemoryUnit(nn.Module):
    model: config.Model
    name_prefix: str  # 'attention' or 'mlp': which sublayer's gate the memory system names
    backward_parts: int = 0  # slices of the tokens in backward; 0: no slices, no recomputation
    platform: str = ''  # compiled for another platform than the running one: 'tpu'; '' is ours

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        x_hat: Float[Array, 'B T D'],
        update: Float[Array, 'B T D'],
        index: Any,
        behind: Norm | None = None,
        x_0: Float[Array, 'B T D'] | None = None,
    ) -> tuple[Float[Array, 'B T D'], Any]:
        """Mixes the stream x with `update` = F(x̂) of sublayer `index` (from 1, may be traced).

        Returns the new stream, and what the norm behind the unit makes of it, if there is one.
        x_0 is what the embedding gave; None where the config does not add it.

        With a mutable collection `intermediates`, leaves g there as `gate`: a tuple of one float32
        array, broadcastable to [B, T, D]; and `stream_rms`, the root mean square of each token's x,
        [B T]. In a whole network they lie below the layer's name, and those of scanned layers are
        stacked, bottom first (R repeats of the period):

            _, seen = model.apply(variables, tokens, positions, mutable=['intermediates'])
            gates = seen['intermediates']
            gates['prefix']['layer_0']['attention_gmu']['gate']  # ([B, T, D],)
            gates['periods']['layer_0']['mlp_gmu']['gate']  # ([R, B, T, D],)
        """
        gmu, eps, name = self.model.gmu, self.model.norm_eps, f'{self.name_prefix}_gate'
        weights = self.weights(x.dtype, index)
        if self.is_mutable_collection('intermediates'):
            gate = gate_of(partial(normalized_product, eps), name, weights, x_hat, update)
            self.sow('intermediates', 'gate', gate.opened(gmu.kind, x.shape[-1]))
            squares = jnp.square(float32_or_wider(x)).mean(axis=-1)
            self.sow('intermediates', 'stream_rms', jnp.sqrt(squares))
        platform = self.platform or jax.default_backend()
        if not self.is_initializing() and gated_norm.available(platform):
            product = recomputed(partial(normalized_product, eps), self.backward_parts > 0)
            gate = gate_of(product, name, weights, x_hat, update)
            more = gmu.adds_embedding or gmu.scales_stream
            given = operands(platform, x, update, gate, weights.scale, behind, more)
            if given and gated_norm.takes(given, platform, sharing('batch', 'length')):
                form = gated_norm.Mix(gmu.kind in INTERPOLATING, gmu.has_gate, eps)
                return mixed_by_kernel(form, platform, given)
        arrays = (x, x_hat, update) if x_0 is None else (x, x_hat, update, x_0)
        function = partial(mix, gmu, eps, name, self.backward_parts > 0)
        if self.backward_parts < 2 or gmu.kind == 'residual':
            x = function(weights, *arrays)
        else:
            tokens = Cut(1, 'length')
            parts = Parts(self.backward_parts, (None, *[tokens] * len(arrays)), tokens)
            x = in_parts(function, parts, weights, *arrays)
        x = constrain(x, 'batch', 'length', 'stream')
        return x, scaled(x, *behind) if behind else None

    @nn.nowrap
    def weights(self, dtype: Any, index: Any) -> Weights:
        gmu, rows = self.model.gmu, gmu_rows(self.model)
        zeros, found = nn.initializers.zeros, Weights()
        if gmu.normalizes:
            found = found._replace(scale=RMSNorm(name='output_norm').scale(self.model.embed_dim))
        if gmu.adds_embedding:
            found = found._replace(embedding=self.vector(rows['embedding'], zeros))
        if gmu.scales_stream:
            ones = nn.initializers.ones
            found = found._replace(stream=self.vector(rows['stream_scale'], ones))
        if gmu.kind == 'residual':
            return found
        if not gmu.has_gate:
            first = gmu.layerscale if gmu.kind == 'layerscale' else 0.0
            init: Any = nn.initializers.constant(first)
            return found._replace(vector=self.vector(rows['scale'], init))
        if gmu.bias == 'depth':
            init = lambda key, shape, dtype: jnp.full(shape, -jnp.log(index), dtype)
        else:
            init = nn.initializers.constant(float(gmu.bias))
        names = ('from_input', 'from_output', 'out')
        matrices = {name: self.matrix(rows, name, dtype) for name in names}
        return found._replace(**matrices, vector=self.vector(rows['bias'], init))

    @nn.nowrap
    def matrix(self, rows: Rows, name: str, dtype: Any) -> Array | None:
        """Reads a matrix of the gate in `dtype`; None where its kind lacks it."""
        if name not in rows:
            return None
        # The matrix that comes last starts at zero, so that g starts as b says.
        last = name == 'out' or 'out' not in rows
        return Einsum(rows[name], dtype, zeros=last, name=name).weight()

    @nn.nowrap
    def vector(self, row: Weight, init: Any) -> Float[Array, '1 1 W']:
        value = self.param(row.name, partitioned(init, row.axes), row.shape, jnp.float32)
        return value.reshape(1, 1, row.size)
