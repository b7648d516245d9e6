"""Log-likelihoods of tokens of given rows, batched by length so that few shapes are compiled."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

from helios_jax.arch import rules
from helios_jax.arch.buffers import loss_chunks
from helios_jax.data.pipeline import Batch
from helios_jax.model.loss import project, with_targets
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import compiler_options
from helios_jax.parallel.sharding import constrain
from helios_jax.restoring import Restored, mesh_of

SHORTEST_ROW = 128  # tokens; shorter rows are padded to it

Pair = tuple[list[int], list[int]]  # tokens that are read, BOS first, and tokens that are scored


class TokenScores(NamedTuple):
    """Scores of the second half of a `Pair`, a number a token."""

    nats: Float32[np.ndarray, 'tokens']  # −ln p(token | all before)
    likeliest: Bool[np.ndarray, 'tokens']  # whether no token had a higher probability


class RowBatch(NamedTuple):
    """Rows that are computed together."""

    indices: list[int]  # which of the rows
    num_rows: int  # B, padding rows among them
    length: int  # T, tokens


def shapes(lengths: Sequence[int], mesh: jax.sharding.Mesh, batch_tokens: int) -> list[RowBatch]:
    """Sorts rows into batches of few shapes, the longest first.

    Which rows share a batch depends on the arguments alone, so that a repeated evaluation makes the
    same batches.

    Args:
      lengths: tokens of each row.
      batch_tokens: B · T of a batch, about; a batch has at least a row for each shard of the mesh.
    """
    shards = rules.shards(mesh, 'batch')
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        groups.setdefault(padded_length(lengths[index], mesh), []).append(index)
    made = []
    for length, members in groups.items():
        rows = min(max(1, batch_tokens // length), len(members))
        rows += -rows % shards
        cuts = range(0, len(members), rows)
        made += [RowBatch(members[cut : cut + rows], rows, length) for cut in cuts]
    return made


def padded_length(length: int, mesh: jax.sharding.Mesh) -> int:
    """Rounds a row's length up to 2^k or 3 · 2^k tokens, and to what the mesh divides."""
    power = max(SHORTEST_ROW, 1 << (length - 1).bit_length())
    shorter = power * 3 // 4
    padded = shorter if power > SHORTEST_ROW and length <= shorter else power
    return padded + -padded % (2 * mesh.shape['context'])


def score(restored: Restored, pairs: Sequence[Pair], shape: RowBatch) -> list[TokenScores]:
    """Scores the second half of each pair, in one batch of the given shape.

    Raises:
      ValueError: as the kernels say of a shape.
    """
    tokens, mask = np.zeros((2, shape.num_rows, shape.length), np.int32)
    segments = np.zeros_like(tokens)
    for row, (before, after) in enumerate(pairs):
        end = len(before) + len(after)
        tokens[row, :end] = [*before, *after]
        mask[row, len(before) : end] = 1
        segments[row, :end] = 1
    positions = np.tile(np.arange(shape.length, dtype=np.int32), (shape.num_rows, 1))
    num_bytes = np.zeros(shape.num_rows, np.int32)  # which nobody asks for here
    batch = Batch(tokens, segments, positions, mask.astype(np.bool_), num_bytes)
    with jax.set_mesh(mesh_of(restored.variables)):
        order, nats, likeliest = jax.device_get(
            scoring()(
                restored.variables,
                batch,
                model=restored.model,
                documents_apart=restored.config.data.documents_apart,
            )
        )
    found = []
    for row, (before, after) in enumerate(pairs):
        # Where the mesh cuts rows their tokens are in another order.
        predicts = np.argsort(order[row])[len(before) - 1 : len(before) + len(after) - 1]
        found.append(TokenScores(nats[row, predicts], likeliest[row, predicts]))
    return found


@functools.cache
def scoring() -> Callable[..., tuple[Array, Array, Array]]:
    """`scores_of_batch`, compiled as this machine's chips want it."""
    options = compiler_options.resolve(jax.local_devices()[0], compiler_options.EVALUATION)
    names = ('model', 'documents_apart')
    return jax.jit(scores_of_batch, static_argnames=names, compiler_options=options)


def scores_of_batch(
    variables: PyTree, batch: Batch, *, model: Transformer, documents_apart: bool
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T'], Bool[Array, 'B T']]:
    """Computes, for each token, its position, and nats and `likeliest` of the token after it."""
    batch, targets, _ = with_targets(batch)
    segments = batch.attention_segments(documents_apart)
    hidden, _ = model.apply(variables, batch.tokens, batch.positions, segments)
    head: Any = model.apply(variables, method='unembedding_weight')
    nats, likeliest = target_scores(hidden, head, targets, model.model.vocab_size)
    # Every process reads all of them.
    whole = [constrain(x, 'whole', 'whole') for x in (batch.positions, nats, likeliest)]
    return whole[0], whole[1], whole[2]


def target_scores(
    hidden: Float[Array, 'B T D'],
    head: Float[Array, 'D V'],
    targets: Int[Array, 'B T'],
    vocab_size: int,
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """Computes −ln p(target) in float32, and whether the target is the likeliest token.

    Runs over chunks of the rows, as the loss does: no [B T V] array exists.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, length, _ = hidden.shape
    chunks = loss_chunks(batch, length, head.shape[1], 1 if mesh.empty else mesh.size)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *x.shape[2:]), 1, 0)

    def of_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = chunk
        logits = project(constrain(hidden, 'loss_batch', 'whole', 'stream'), head, vocab_size)
        logits = constrain(logits, 'loss_batch', 'whole', 'unembed_vocab')
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - own
        return nats, jnp.argmax(logits, axis=-1) == targets

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, length)

    nats, likeliest = jax.lax.map(of_chunk, (cut(hidden), cut(targets)))
    return join(nats), join(likeliest)


def windows(tokens: list[int], bos_id: int, length: int, stride: int) -> Iterator[Pair]:
    """Cuts a text into rows of at most `length` tokens that score each of its tokens once.

    Every row starts with BOS, as rows of training do. The first scores all that fits; each one
    after it scores the next `stride` tokens, and reads as many before them as fit.

    Args:
      length: tokens of a row, BOS among them, at least 3.
      stride: at most length − 2.
    """
    done = min(length - 1, len(tokens))
    if tokens:
        yield [bos_id], tokens[:done]
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        yield [bos_id, *tokens[end - length + 1 : done]], tokens[done:end]
        done = end
