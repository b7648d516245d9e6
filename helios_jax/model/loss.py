"""Cross-entropy over the vocabulary that never holds the logits of all tokens.

The unembedding and the loss run together over chunks of the sequence. The gradients are made in
the forward pass, chunk by chunk, while a chunk's logits exist: a checkpointed scan would gather the
head twice and reduce its float32 gradient once a chunk. The head's vocabulary is split over the
mesh and each chunk's tokens are gathered to it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from helios_jax.arch.buffers import loss_chunks
from helios_jax.model.layers import float32_or_wider, precision
from helios_jax.parallel.context import zigzag_rows
from helios_jax.parallel.sharding import constrain


class Losses(NamedTuple):
    total: Float[Array, '']  # Σ weight · (nll + z · lse²)
    nll: Float[Array, 'B T']  # −ln p(target) of each token, unweighted


def next_tokens(
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'],
    loss_mask: Bool[Array, 'B T'],
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
    """Returns next tokens as targets; weight 1 in the same segment and under the mask, else 0."""
    target = jnp.roll(tokens, -1, axis=1)
    same = (jnp.roll(segment_ids, -1, axis=1) == segment_ids) & (segment_ids > 0)
    counts = same & jnp.roll(loss_mask, -1, axis=1)
    counts = counts & (jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1)
    return target, counts.astype(jnp.float32)


def with_targets(batch: Any) -> tuple[Any, Int[Array, 'B T'], Float[Array, 'B T']]:
    """Returns a batch as the model takes it, and the target and the weight of each of its tokens.

    Targets follow the order of the documents. Where the mesh cuts rows, tokens are permuted after
    that (`zigzag_rows`): from here on `positions` alone tell their order.

    Args:
      batch: `data.pipeline.Batch`, or another tuple with `tokens`, `segment_ids`, `loss_mask`.
    """
    targets, weights = next_tokens(batch.tokens, batch.segment_ids, batch.loss_mask)
    return zigzag_rows((batch, targets, weights))


def project(
    hidden: Float[Array, '*tokens D'], head: Float[Array, 'D V'], vocab_size: int
) -> Float[Array, '*tokens V']:
    """Computes float32 logits; those beyond vocab_size are −∞."""
    dtype = hidden.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    logits = jnp.einsum(
        '...d,dv->...v',
        hidden,
        head.astype(dtype),
        preferred_element_type=wide,
        precision=precision(dtype),
    )
    real = jnp.arange(head.shape[1]) < vocab_size
    return jnp.where(jnp.expand_dims(real, range(hidden.ndim - 1)), logits, -jnp.inf)


def _num_chunks(hidden: Array, head: Array) -> int:
    """The smallest divisor of T that keeps a chunk's logits within bounds on each device."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    batch, length, _ = hidden.shape
    return loss_chunks(batch, length, head.shape[1], devices)


def _chunk(
    hidden: Array, head: Array, targets: Array, weights: Array, vocab_size: int, z_loss: float
) -> tuple[Array, Array, Array]:
    """Computes weighted loss, nll [N] and d loss / d logits [N V] of N tokens, in float32."""
    logits = project(constrain(hidden, 'loss_batch', 'stream'), head, vocab_size)
    logits = constrain(logits, 'loss_batch', 'unembed_vocab')
    lse = jax.nn.logsumexp(logits, axis=-1)
    ids = jnp.arange(head.shape[1], dtype=targets.dtype)[None]
    is_target = ids == targets[:, None]
    nll = lse - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    loss = jnp.sum(weights * (nll + z_loss * lse**2))
    scale = (weights * (1 + 2 * z_loss * lse))[:, None]
    gradient = scale * jnp.exp(logits - lse[:, None]) - jnp.where(is_target, weights[:, None], 0)
    return loss, nll, gradient


def _split(x: Array, chunks: int) -> Array:
    """Cuts [B T …] into [chunks, B · T/chunks, …].

    Tokens in one dimension: a few rows a device are no multiple of a TPU's tile, and the sum of
    d_hidden over devices would not be scattered.
    """
    batch, length, *rest = x.shape
    apart = jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *rest), 1, 0)
    return apart.reshape(chunks, -1, *rest)


def _join(x: Array, batch: int) -> Array:
    """Undoes `_split`."""
    chunks, _, *rest = x.shape
    apart = jnp.moveaxis(x.reshape(chunks, batch, -1, *rest), 0, 1)
    return apart.reshape(batch, -1, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    targets: Int[Array, 'B T'],
    weights: Float[Array, 'B T'],
    vocab_size: int,
    z_loss: float = 0.0,
) -> Losses:
    """Computes −ln softmax(hidden · head)[targets] in chunks; only `total` is differentiable.

    The matmul is in hidden's dtype; the gradient of a float32 head is accumulated in float32.
    """
    chunks = _num_chunks(hidden, head)

    def step(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        h, t, w = chunk
        loss, nll, _ = _chunk(h, head, t, w, vocab_size, z_loss)
        return total + loss, nll

    cut = tuple(_split(x, chunks) for x in (hidden, targets, weights))
    total, nll = jax.lax.scan(step, jnp.zeros((), weights.dtype), cut)
    return Losses(total, _join(nll, len(hidden)))


def _forward(hidden, head, targets, weights, vocab_size, z_loss):
    chunks = _num_chunks(hidden, head)
    dtype, exact = hidden.dtype, precision(hidden.dtype)
    wide = float32_or_wider(jnp.zeros((), dtype)).dtype

    def step(carry, chunk):
        total, d_head = carry
        h, t, w = chunk
        h = constrain(h, 'loss_batch', 'stream')
        loss, nll, gradient = _chunk(h, head, t, w, vocab_size, z_loss)
        gradient = gradient.astype(dtype)
        d_hidden = jnp.einsum('nv,dv->nd', gradient, head.astype(dtype), precision=exact)
        d_hidden = constrain(d_hidden, 'batch', 'stream')
        d_head = d_head + jnp.einsum(
            'nd,nv->dv', h, gradient, precision=exact, preferred_element_type=wide
        )
        return (total + loss, constrain(d_head, 'stream', 'unembed_vocab')), (nll, d_hidden)

    cut = tuple(_split(x, chunks) for x in (hidden, targets, weights))
    zeros = constrain(jnp.zeros(head.shape, wide), 'stream', 'unembed_vocab')
    (total, d_head), (nll, d_hidden) = jax.lax.scan(
        step, (jnp.zeros((), weights.dtype), zeros), cut
    )
    return (
        Losses(total, _join(nll, len(hidden))),
        (_join(d_hidden, len(hidden)), d_head.astype(head.dtype)),
    )


def _backward(vocab_size, z_loss, residuals, cotangents):
    d_hidden, d_head = residuals
    scale = cotangents.total
    return (
        (scale * d_hidden).astype(d_hidden.dtype),
        (scale * d_head).astype(d_head.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward)
