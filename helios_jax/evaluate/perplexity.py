"""Held-out loss and bits per byte, the figure that compares across tokenizers."""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from helios_jax.data.pipeline import Batch
from helios_jax.errors import require
from helios_jax.model.loss import cross_entropy, with_targets
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import compiler_options


@functools.cache
def summing() -> Callable[..., dict[str, Array]]:
    """`batch_sums`, compiled as this machine's chips want it."""
    options = compiler_options.resolve(jax.local_devices()[0], compiler_options.EVALUATION)
    names = ('model', 'eos_id', 'documents_apart')
    return jax.jit(batch_sums, static_argnames=names, compiler_options=options)


def batch_sums(
    variables: PyTree, batch: Batch, *, model: Transformer, eos_id: int, documents_apart: bool
) -> dict[str, Float[Array, '']]:
    """Sums up a batch: nats of all targets, nats of text (not EOS), targets, bytes of text."""
    batch, targets, weights = with_targets(batch)
    segments = batch.attention_segments(documents_apart)
    hidden, _ = model.apply(variables, batch.tokens, batch.positions, segments)
    head = model.apply(variables, method='unembedding_weight')
    nll = cross_entropy(hidden, head, targets, weights, model.model.vocab_size).nll
    text = weights * (targets != eos_id)
    return {
        'nats': jnp.sum(nll * weights),
        'text_nats': jnp.sum(nll * text),
        'targets': jnp.sum(weights),
        'bytes': jnp.sum(batch.num_bytes).astype(jnp.float32),
    }


def evaluate(
    model: Transformer,
    variables: PyTree,
    batches: Iterable[Batch],
    *,
    eos_id: int,
    documents_apart: bool,
    lost_fraction: float = 0.0,
) -> dict[str, float]:
    """Computes `loss` (nats per target), `perplexity`, `bits_per_byte`, `targets` and `bytes`.

    Args:
      variables: 'params', and 'router' for a mixture of experts.
      batches: global arrays, on the mesh that is set.
      documents_apart: whether attention keeps to segments; False for rows that are one stream.
      lost_fraction: share of the text's bytes that the tokenizer lost, which no figure counts; it
        stands beside the figures where it is above 0.
    Raises:
      UserError: the batches hold no text.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        sums = summing()(
            variables, batch, model=model, eos_id=eos_id, documents_apart=documents_apart
        )
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    require(
        totals.get('targets', 0) > 0 and totals['bytes'] > 0,
        'the text to evaluate on has no token to predict; give longer documents.',
    )
    loss = totals['nats'] / totals['targets']
    figures = {
        'loss': loss,
        'perplexity': math.exp(min(loss, 700)),
        'bits_per_byte': totals['text_nats'] / math.log(2) / totals['bytes'],
        'targets': totals['targets'],
        'bytes': totals['bytes'],
    }
    return figures | ({'lost_fraction': lost_fraction} if lost_fraction else {})
