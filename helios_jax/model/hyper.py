"""Hyper-connections, which carry n streams where a residual network carries one.

    h = Σ_i pre_i H_i        u = F(RMSNorm(h))        H'_j = Σ_i res_ij H_i + post_j u

H_1 … H_n lie side by side in one array [B, T, n·D]. The coefficients are learnt numbers (static),
or numbers and what the token adds to them (dynamic): Hyper-Connections, 2409.19606. In the
manifold-constrained form (mHC, 2512.24880) pre and post lie between bounds, and res is doubly
stochastic: a product of such matrices over all layers is one too, so that no stream grows.

At the start every stream is the embedding, post is 1, and res and pre each add up to 1: all streams
stay alike, and the network is the pre-norm residual network. What differs from sublayer to
sublayer is the stream that is read; else alike streams would have alike gradients for ever.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from helios_jax import config
from helios_jax.arch.weights import Weight
from helios_jax.arch.weights import gmu as gmu_rows
from helios_jax.kernels import gated_norm
from helios_jax.model.layers import (
    Einsum,
    RMSNorm,
    float32_or_wider,
    normalize,
    partitioned,
    precision,
    scaled,
)
from helios_jax.model.mixing import recomputed
from helios_jax.parallel.sharding import constrain

FIRST_ALPHA = 0.01  # of both papers
OTHERS = 0.01  # share of each other stream in pre and res of a fresh constrained unit
SINKHORN_STEPS = 20  # of mHC's paper


class Learnt(NamedTuple):
    """Vectors of a unit, float32."""

    bias: Float[Array, '1 1 n C']  # row i: pre_i, post_i, res_i1 … res_in; C = n + 2
    alpha: Float[Array, '1 1 1 C'] | None  # factors of what a token adds; None: it adds nothing


class Coefficients(NamedTuple):
    """Weights of the streams, float32; without the token's part B and T are 1."""

    pre: Float[Array, '#B #T n']
    post: Float[Array, '#B #T n']
    res: Float[Array, '#B #T n n']  # from stream i to stream j


def spread(model: config.Model, x: Float[Array, 'B T D']) -> Float[Array, 'B T nD']:
    """Starts every stream with x."""
    n = model.gmu.num_streams
    return jnp.tile(x, (1, 1, n)) if n > 1 else x


def merged(model: config.Model, x: Float[Array, 'B T nD']) -> Float[Array, 'B T D']:
    """Returns the mean of the streams, which to a norm is the papers' sum, with the eps of one."""
    n = model.gmu.num_streams
    if n == 1:
        return x
    total: Any = sum(apart(n, x))
    return (total / n).astype(x.dtype)


def apart(n: int, x: Float[Array, 'B T nD']) -> list[Float[Array, 'B T D']]:
    """Splits an array into its streams, in float32."""
    return jnp.split(float32_or_wider(x), n, axis=-1)


class HyperConnection(nn.Module):
    model: config.Model
    name_prefix: str  # 'attention' or 'mlp': which sublayer's logits the memory system names
    again: bool = False  # the backward pass recomputes all but what the memory system names
    platform: str = ''  # compiled for another platform than the running one; '' is ours

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T nD'], index: Any
    ) -> tuple[Float[Array, 'B T D'], Callable[[Array], Array]]:
        """Reads the streams x for sublayer `index` (from 1, may be traced).

        Returns h, and the function that makes the new streams [B, T, n·D] of u [B, T, D].

        With a mutable collection `intermediates`, leaves `Coefficients` there as `coefficients`
        and the `stream_rms` of all streams together, as `GatedMemoryUnit` leaves its gate.
        """
        gmu, eps = self.model.gmu, self.model.norm_eps
        platform = self.platform or jax.default_backend()
        if not self.is_initializing() and gated_norm.available(platform):
            gated_norm.log_refusal(platform, 'the kernel has one stream (model.gmu.kind=hyper).')
        learnt, scale, logits = self.learnt(index), None, None
        if gmu.normalizes:
            scale = RMSNorm(name='output_norm').scale(self.model.embed_dim)
        rows = gmu_rows(self.model)
        if 'from_streams' in rows:
            matrix = Einsum(rows['from_streams'], x.dtype, zeros=True, name='from_streams')
            product = recomputed(partial(streams_product, gmu, eps), self.again)
            logits = checkpoint_name(product(x, matrix.weight()), f'{self.name_prefix}_gate')
        if self.is_mutable_collection('intermediates'):
            self.sow('intermediates', 'coefficients', coefficients(gmu, learnt, logits))
            squares = jnp.square(float32_or_wider(x)).mean(axis=-1)
            self.sow('intermediates', 'stream_rms', jnp.sqrt(squares))
        h = recomputed(partial(read, gmu), self.again)(x, learnt, logits)
        writes = recomputed(partial(write, gmu, eps), self.again)
        return h, lambda update: constrain(
            writes(x, update, learnt, logits, scale), 'batch', 'length', 'streams'
        )

    @nn.nowrap
    def learnt(self, index: Any) -> Learnt:
        gmu, rows = self.model.gmu, gmu_rows(self.model)
        n = gmu.streams
        init: Any = lambda key, shape, dtype: first_bias(gmu, index).astype(dtype).reshape(shape)
        bias = self.vector(rows['bias'], init).reshape(1, 1, n, n + 2)
        if 'alpha' not in rows:
            return Learnt(bias, None)
        alpha = self.vector(rows['alpha'], nn.initializers.constant(FIRST_ALPHA))
        # The dynamic form has one factor for pre and res.
        of_res = 0 if gmu.hyper == 'dynamic' else 2
        columns = jnp.array([0, 1, *[of_res] * n])
        return Learnt(bias, alpha[columns].reshape(1, 1, 1, n + 2))

    @nn.nowrap
    def vector(self, row: Weight, init: Any) -> Float[Array, 'W']:
        return self.param(row.name, partitioned(init, row.axes), row.shape, jnp.float32)


def first_bias(gmu: config.GMU, index: Any) -> Float[Array, 'n C']:
    """Returns the bias of a fresh unit of sublayer `index`: it reads stream (index − 1) mod n."""
    n = gmu.streams
    own, same, post = jax.nn.one_hot((index - 1) % n, n), jnp.eye(n), jnp.ones(n)
    if gmu.hyper == 'constrained':
        own, same = (OTHERS + (1 - n * OTHERS) * one for one in (own, same))
        own, same, post = jnp.log(own) - jnp.log1p(-own), jnp.log(same), jnp.zeros(n)
    return jnp.concatenate([own[:, None], post[:, None], same], axis=1)


def streams_product(
    gmu: config.GMU, eps: float, x: Float[Array, 'B T nD'], weight: Float[Array, 'E W']
) -> Float[Array, 'B T R']:
    """Multiplies the normalised streams with a weight, in its dtype; R = n (n + 2).

    The dynamic form normalises and multiplies each stream alone, E = D, the constrained form all of
    them as one vector, E = n·D. A learnt scale of the norm would be part of the weight.
    """
    B, T, S = x.shape
    each = x.reshape(B, T, S // weight.shape[0], weight.shape[0])
    normalized = normalize(each, eps).astype(weight.dtype)
    product = jnp.einsum('btie,ew->btiw', normalized, weight, precision=precision(weight.dtype))
    return product.reshape(B, T, -1)


def coefficients(
    gmu: config.GMU, learnt: Learnt, logits: Float[Array, 'B T R'] | None
) -> Coefficients:
    """Computes pre, post and res, for each token where there are logits."""
    terms = learnt.bias
    if logits is not None and learnt.alpha is not None:
        B, T, _ = logits.shape
        added = float32_or_wider(logits).reshape(B, T, *terms.shape[2:])
        terms = terms + learnt.alpha * (jnp.tanh(added) if gmu.hyper == 'dynamic' else added)
    pre, post, res = terms[..., 0], terms[..., 1], terms[..., 2:]
    if gmu.hyper != 'constrained':
        return Coefficients(pre, post, res)
    return Coefficients(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), sinkhorn(res))


def sinkhorn(logits: Float[Array, '*B n n']) -> Float[Array, '*B n n']:
    """Divides exp(logits) by the sums of its rows and of its columns, over and over.

    The result is doubly stochastic (Sinkhorn and Knopp, 1967). The shares of a new stream, a
    column, come last and add up to 1 exactly. Logarithms do not overflow.
    """

    def step(_: Any, logits: Array) -> Array:
        return jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=1), axis=0)

    # Tokens come last within the loop: a TPU pads the last axis to 128.
    turned = jnp.moveaxis(logits, (-2, -1), (0, 1))
    mixed = jnp.exp(jax.lax.fori_loop(0, SINKHORN_STEPS, step, turned))
    return jnp.moveaxis(mixed, (0, 1), (-2, -1))


def read(
    gmu: config.GMU,
    x: Float[Array, 'B T nD'],
    learnt: Learnt,
    logits: Float[Array, 'B T R'] | None,
) -> Float[Array, 'B T D']:
    """Returns h = Σ_i pre_i H_i, added up in float32, in x.dtype."""
    pre = coefficients(gmu, learnt, logits).pre
    h: Any = sum(pre[..., i, None] * own for i, own in enumerate(apart(gmu.streams, x)))
    return h.astype(x.dtype)


def write(
    gmu: config.GMU,
    eps: float,
    x: Float[Array, 'B T nD'],
    update: Float[Array, 'B T D'],
    learnt: Learnt,
    logits: Float[Array, 'B T R'] | None,
    scale: Float[Array, 'D'] | None,
) -> Float[Array, 'B T nD']:
    """Returns all H'_j = Σ_i res_ij H_i + post_j u, added up in float32, in x.dtype.

    Args:
      scale: scale of the output norm; None: u is not normalised.
    """
    n = gmu.streams
    _, post, res = coefficients(gmu, learnt, logits)
    update = float32_or_wider(update if scale is None else scaled(update, scale, eps))
    old = apart(n, x)
    # Sums of whole streams, as n is small: XLA makes one pass of them.
    new = [
        sum((res[..., i, j, None] * old[i] for i in range(n)), post[..., j, None] * update)
        for j in range(n)
    ]
    return jnp.concatenate(new, axis=-1).astype(x.dtype)
