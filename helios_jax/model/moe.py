"""Feed-forward sublayers: the dense SwiGLU and the top-k mixture of experts (Hydra).

The router scores every expert for every token in float32 and the top X by score + balance bias
compute; their weights are the scores without the bias, which are renormalised unless
`moe.renormalize` is off. Balance comes from the bias (2408.15664), from an auxiliary loss
(2101.03961), or both. Nothing is dropped unless a capacity factor bounds the buffers (see
parallel/experts.py).
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from helios_jax import config
from helios_jax.arch import weights
from helios_jax.memory.parts import Cut, Parts, in_parts
from helios_jax.model.exact import exact_product
from helios_jax.model.layers import Einsum, float32_or_wider, partitioned, precision
from helios_jax.parallel.experts import apply_experts
from helios_jax.parallel.sharding import constrain


class Stats(NamedTuple):
    """Statistics of one MoE layer, in float32."""

    load: Float[Array, '*L E']  # tokens that chose each expert
    dropped: Float[Array, '*L']  # (token, expert) pairs that found no room
    entropy: Float[Array, '*L']  # entropy of the mean of the tokens' router distributions, nats
    balance_loss: Float[Array, '*L']  # E Σ_e f_e p_e; 1 when even
    z_loss: Float[Array, '*L']  # mean squared log-sum-exp of the router's logits


class SwiGLU(nn.Module):
    """Gated MLP: down(silu(gate x) ⊙ up x) (2002.05202)."""

    model: config.Model
    mlp_dim: int
    backward_parts: int = 0  # slices of the hidden channels in backward; 0: no slices

    @nn.compact
    def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        gate, up, down = (
            Einsum(row, x.dtype, name=name).weight()
            for name, row in weights.swiglu(self.model, self.mlp_dim).items()
        )
        if self.backward_parts < 2:
            return swiglu(x, gate, up, down)
        columns, rows = Cut(1, 'mlp'), Cut(0, 'mlp')
        parts = Parts(self.backward_parts, (None, columns, columns, rows), None)
        return in_parts(swiglu, parts, x, gate, up, down)


def swiglu(
    x: Float[Array, 'B T D'],
    gate: Float[Array, 'D F'],
    up: Float[Array, 'D F'],
    down: Float[Array, 'F D'],
) -> Float[Array, 'B T D']:
    dot = partial(jnp.einsum, precision=precision(x.dtype))
    hidden = [
        checkpoint_name(constrain(dot('btd,df->btf', x, w), 'batch', 'length', 'mlp'), 'gate_up')
        for w in (gate, up)
    ]
    product = jax.nn.silu(float32_or_wider(hidden[0])).astype(x.dtype) * hidden[1]
    return dot('btf,fd->btd', product, down)


def route(
    logits: Float[Array, 'B T E'],
    bias: Float[Array, 'E'],
    moe: config.MoE,
) -> tuple[Int[Array, 'B T X'], Float[Array, 'B T X'], Float[Array, 'B T E']]:
    """Returns the chosen experts (ties to the lower index), their weights, and all scores."""
    if moe.scores == 'softmax':
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
    _, choices = jax.lax.top_k(
        jax.lax.stop_gradient(scores) + bias.reshape(1, 1, -1), moe.num_experts_per_token
    )
    # Saved, so that recomputation never routes again: a tie broken otherwise would be another
    # function in the backward pass.
    choices = checkpoint_name(choices, 'router_choices')
    weights = jnp.take_along_axis(scores, choices, axis=-1)
    total = weights.sum(axis=-1, keepdims=True) + 1e-20 if moe.renormalize else 1.0
    weights = moe.scale * weights / total
    return choices, weights, scores


def router_stats(
    logits: Float[Array, 'B T E'],
    scores: Float[Array, 'B T E'],
    choices: Int[Array, 'B T X'],
    real: Float[Array, 'B T'],
    dropped: Int[Array, ''],
) -> Stats:
    """Computes statistics and losses of a router over the real (not padding) tokens."""
    num_experts, num_chosen = logits.shape[-1], choices.shape[-1]
    num_tokens = jnp.maximum(real.sum(), 1)
    chosen = jax.nn.one_hot(choices, num_experts, dtype=jnp.float32).sum(axis=2)
    load = jnp.einsum('bte,bt->e', chosen, real)
    shares = scores / scores.sum(axis=-1, keepdims=True)
    mean_share = jnp.einsum('bte,bt->e', shares, real) / num_tokens
    fraction = load / (num_tokens * num_chosen)
    entropy = -jnp.sum(shares * jnp.log(shares + 1e-20), axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return Stats(
        load=load,
        dropped=dropped.astype(jnp.float32),
        entropy=jnp.sum(entropy * real) / num_tokens,
        balance_loss=num_experts * jnp.sum(jax.lax.stop_gradient(fraction) * mean_share),
        z_loss=jnp.sum(lse**2 * real) / num_tokens,
    )


class MixtureOfExperts(nn.Module):
    model: config.Model
    platform: str = ''  # compiled for another platform than the running one; '' is ours

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T D'], segment_ids: Int[Array, 'B T'] | None
    ) -> tuple[Float[Array, 'B T D'], Stats]:
        """Sums each token's weighted experts and the shared ones; padding gives zeros."""
        moe, dtype = self.model.moe, x.dtype
        rows, balance = weights.moe(self.model), weights.router_bias(self.model)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        router = Einsum(rows['router'], wide, name='router').weight()
        logits = exact_product(x, router, self.platform)
        zeros = partitioned(jnp.zeros, balance.axes)
        bias = self.variable('router', 'bias', zeros, balance.shape, jnp.float32).value
        choices, shares, scores = route(logits, bias, moe)
        if segment_ids is None:
            real = jnp.ones(x.shape[:2], bool)
        else:
            real = segment_ids > 0
        y, dropped = apply_experts(
            x,
            jnp.where(real[..., None], choices, moe.num_experts),  # that many: no expert
            shares,
            *(Einsum(rows[n], dtype, name=n).weight() for n in ('gate', 'up', 'down')),
            capacity_factor=moe.capacity_factor,
            sharded=not self.is_initializing(),
            platform=self.platform,
        )
        if moe.num_shared_experts:
            shared = SwiGLU(self.model, weights.shared_mlp_dim(self.model), name='shared')
            y = y + shared(x)
        return y, router_stats(logits, scores, choices, real.astype(jnp.float32), dropped)
