"""Scores several continuations of one context, which is read once: a question and its choices.

The context fills a cache of keys and values, which each choice then reads. What a multiple-choice
task asks for is mostly contexts that its choices share.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from helios_jax.arch import rules
from helios_jax.evaluate.scores import Pair, TokenScores, padded_length, target_scores
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import compiler_options
from helios_jax.parallel.sharding import constrain
from helios_jax.restoring import Restored, mesh_of

SHORTEST_CHOICE = 16  # tokens; shorter choices are padded to it


class Question(NamedTuple):
    """Tokens that are read, BOS first, and the choices, each of which is scored after them."""

    context: list[int]
    choices: list[list[int]]


class QuestionBatch(NamedTuple):
    """Questions that are computed together."""

    indices: list[int]  # which of the questions
    num_questions: int  # Q, padding among them
    length: int  # T, tokens of a context
    num_choices: int  # C of each question, padding among them
    choice_length: int  # U, tokens of a choice


def questions(pairs: Sequence[Pair], mesh: jax.sharding.Mesh) -> list[Question]:
    """Joins pairs of the same context, where that leaves fewer tokens to read.

    Where the mesh cuts rows, nothing is joined: each device holds a whole cache.
    """
    found: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for context, choice in pairs:
        found.setdefault(tuple(context), {})[tuple(choice)] = None
    made = []
    for before, afters in found.items():
        joined = Question(list(before), [list(after) for after in afters])
        apart = sum(padded_length(len(before) + len(after), mesh) for after in afters)
        pays = form(joined, mesh)[0] < apart and mesh.shape['context'] == 1
        made += [joined] if pays else [Question(joined.context, [own]) for own in joined.choices]
    return made


def form(question: Question, mesh: jax.sharding.Mesh) -> tuple[int, int, int, int]:
    """Returns the tokens of a question and its T, C and U, rounded up so that few are compiled."""
    length = padded_length(len(question.context), mesh)
    num_choices = 1 << (len(question.choices) - 1).bit_length()
    longest = max(map(len, question.choices))
    choice_length = max(SHORTEST_CHOICE, 1 << (longest - 1).bit_length())
    return length + num_choices * choice_length, length, num_choices, choice_length


def batches(
    some: Sequence[Question], mesh: jax.sharding.Mesh, batch_tokens: int
) -> list[QuestionBatch]:
    """Sorts questions into batches of few shapes, the longest first, as `scores.shapes`."""
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for index, question in enumerate(some):
        groups.setdefault(form(question, mesh), []).append(index)
    made = []
    for (tokens, *shape), members in sorted(groups.items(), reverse=True):
        number = min(max(1, batch_tokens // tokens), len(members))
        number += -number % rules.shards(mesh, 'batch')
        for cut in range(0, len(members), number):
            made.append(QuestionBatch(members[cut : cut + number], number, *shape))
    return made


def score_choices(
    restored: Restored, some: Sequence[Question], batch: QuestionBatch
) -> list[list[TokenScores]]:
    """Scores every choice of each question, in one batch of the given shape."""
    contexts = np.zeros((2, batch.num_questions, batch.length), np.int32)
    choices = np.zeros((2, batch.num_questions, batch.num_choices, batch.choice_length), np.int32)
    for row, question in enumerate(some):
        contexts[:, row, : len(question.context)] = question.context, [1] * len(question.context)
        for number, choice in enumerate(question.choices):
            choices[:, row, number, : len(choice)] = choice, [1] * len(choice)
    with jax.set_mesh(mesh_of(restored.variables)):
        nats, likeliest = jax.device_get(
            scoring()(restored.variables, *contexts, *choices, model=restored.model)
        )
    return [
        [
            TokenScores(nats[row, number, : len(choice)], likeliest[row, number, : len(choice)])
            for number, choice in enumerate(question.choices)
        ]
        for row, question in enumerate(some)
    ]


@functools.cache
def scoring() -> Callable[..., tuple[Array, Array]]:
    """`scores_of_choices`, compiled as this machine's chips want it."""
    options = compiler_options.resolve(jax.local_devices()[0], compiler_options.EVALUATION)
    return jax.jit(scores_of_choices, static_argnames=('model',), compiler_options=options)


def scores_of_choices(
    variables: PyTree,
    contexts: Int[Array, 'Q T'],
    real: Int[Array, 'Q T'],
    choices: Int[Array, 'Q C U'],
    real_choices: Int[Array, 'Q C U'],
    *,
    model: Transformer,
) -> tuple[Float[Array, 'Q C U'], Bool[Array, 'Q C U']]:
    """Computes nats and `likeliest` of each token of each choice.

    Args:
      real, real_choices: 1 for a token, 0 for padding behind it.
    """
    (Q, T), (_, C, U) = contexts.shape, choices.shape
    run = functools.partial(model.apply, cache_length=T + U, mutable=['cache'])
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (Q, T))
    output: Any = run(variables, contexts, positions, real)
    (hidden, _), written = output
    lengths = real.sum(axis=1, dtype=jnp.int32)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    # Rows stay where they are: the choices of a question are next to one another.
    cache = jax.tree.map(lambda x: jnp.repeat(x, C, axis=x.ndim - 4), written['cache'])
    tokens, ids = (x.reshape(Q * C, U) for x in (choices, real_choices))
    positions = jnp.repeat(lengths, C)[:, None] + jnp.arange(U, dtype=jnp.int32)[None]
    output = run({**variables, 'cache': cache}, tokens, positions, ids)
    (hidden, _), _ = output
    before = jnp.concatenate([jnp.repeat(last, C, axis=0), hidden[:, :-1]], axis=1)
    head: Any = model.apply(variables, method='unembedding_weight')
    nats, likeliest = target_scores(before, head, tokens, model.model.vocab_size)
    # Every process reads all of them.
    whole = [constrain(x, 'whole', 'whole').reshape(Q, C, U) for x in (nats, likeliest)]
    return whole[0], whole[1]
