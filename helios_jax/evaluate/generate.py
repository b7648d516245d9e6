"""Samples text from a model (decoding.py), and compiles what that takes while it is being read."""

import concurrent.futures
import functools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from helios_jax import config
from helios_jax.data.tokenizer import Tokenizer
from helios_jax.errors import require, within_int32
from helios_jax.evaluate.conversation import Chat, opened, turn_ends
from helios_jax.evaluate.decoding import (
    batched,
    empty_cache,
    extending,
    num_shards,
    prefill,
    slots_for,
    with_room,
)
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import compiler_options
from helios_jax.parallel.sharding import constrain
from helios_jax.restoring import Restored, mesh_of

log = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames=('top_k',))
def sample(
    logits: Float[Array, 'B V'],
    key: Array,
    temperature: Float[Array, ''] | float,
    top_k: int,
    top_p: Float[Array, ''] | float,
) -> Int[Array, 'B']:
    """Draws a token a row.

    Args:
      temperature: 0 takes the most likely token.
      top_k: draw from the k most likely tokens; 0 is all.
      top_p: draw from the fewest most likely tokens whose probability reaches this; 1 is all.
    """
    if top_k:
        worst = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, axis=-1)[:, ::-1]
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(
        ordered, axis=-1
    )
    worst = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    scaled = jnp.where(scaled < worst, -jnp.inf, scaled)
    drawn = jax.random.categorical(key, scaled, axis=-1)
    # Every process reads all of them.
    return constrain(jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)), 'whole')


@functools.partial(jax.jit, static_argnames=('top_k',))
def draw(
    logits: Float[Array, 'B V'],
    seed: Int[Array, ''] | int,
    count: Int[Array, ''] | int,
    temperature: Float[Array, ''] | float,
    top_k: int,
    top_p: Float[Array, ''] | float,
) -> Int[Array, 'B']:
    """`sample` of the token that `count` tokens came before: one program, its key included."""
    return sample(
        logits, jax.random.fold_in(jax.random.key(seed), count), temperature, top_k, top_p
    )


def generate(
    model: Transformer,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_id: int,
    end_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stopped: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids, BOS included) by up to `max_tokens` tokens.

    A row ends before EOS or one of `end_ids`, or when `stopped(row, its new tokens)` says so.

    Raises:
      UserError: an empty prompt, or a sampling setting out of range.
    """
    check(prompts, max_tokens, temperature, top_k, top_p, seed)
    wanted = len(prompts)
    prompts, chunk = batched(prompts)
    # The mesh may divide the sequence: what a call reads is padded to what it divides.
    padding = (0, 0), (0, num_shards('length') - 1)
    logits, cache = prefill(model, variables, prompts, chunk)
    positions = np.array([len(p) for p in prompts], np.int32)
    output: list[list[int]] = [[] for _ in prompts]
    alive = np.arange(len(prompts)) < wanted
    for count in range(max_tokens):
        tokens = np.asarray(draw(logits, seed, count, temperature, top_k, top_p))
        for row in np.flatnonzero(alive):
            if tokens[row] == eos_id or tokens[row] in end_ids:
                alive[row] = False
                continue
            output[row].append(int(tokens[row]))
            if stopped and stopped(int(row), output[row]):
                alive[row] = False
        if not alive.any() or count == max_tokens - 1:
            break
        cache = with_room(cache, int(positions[alive].max()) + 1)
        arrays = (np.pad(x[:, None].astype(np.int32), padding) for x in (tokens, positions, alive))
        logits, cache = extending(compiler_options.DECODING)(variables, cache, *arrays, model=model)
        positions += 1
    return output[:wanted]


def check(
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    require(all(len(p) > 0 for p in prompts) and len(prompts) > 0, 'a prompt has no token at all.')
    require(max_tokens > 0, f'max_tokens={max_tokens} must be above 0.')
    require(
        0 <= temperature < math.inf,
        f'temperature={temperature} must be 0 (greedy) or more, and finite.',
    )
    require(0 < top_p <= 1, f'top_p={top_p} must lie above 0 and at most 1.')
    require(top_k >= 0, f'top_k={top_k} must be 0 (all) or more.')
    within_int32('seed', seed)


def complete(
    restored: Restored,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    chat: Chat | None = None,
    **settings: Any,
) -> list[str]:
    """Returns the texts that continue `prompts`, each cut before the first of the `stop` texts.

    Warns where they reach past the length that the model was trained at.

    Args:
      chat: makes each prompt a conversation, whose answer is returned.
      settings: what `generate` takes besides.
    Raises:
      UserError: as `generate`; an empty text to stop at; a chat template that fails.
    """
    require(all(stop), 'stop is empty, which every text ends with; name some text.')
    tokens = encoded(restored.tokenizer, prompts, chat)
    ends = turn_ends(restored.tokenizer) if chat is not None else ()
    warn_of_length(restored.model.model.rope, max(map(len, tokens), default=0), max_tokens)
    return continued(restored, tokens, max_tokens=max_tokens, stop=stop, end_ids=ends, **settings)


def continued(
    restored: Restored,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    end_ids: Sequence[int] = (),
    **settings: Any,
) -> list[str]:
    """Returns what `complete` does, of prompts that are tokens, BOS included.

    Args:
      end_ids: tokens to end before, beside the tokenizer's own.
    """
    model, variables, tokenizer, _ = restored

    def stopped(_: int, new: list[int]) -> bool:
        text = tokenizer.decode(new)
        return any(end in text for end in stop)

    with jax.set_mesh(mesh_of(variables)):
        made = generate(
            model,
            variables,
            prompts,
            eos_id=tokenizer.eos_id,
            end_ids={*tokenizer.end_ids, *end_ids},
            max_tokens=max_tokens,
            stopped=stopped if stop else None,
            **settings,
        )
    texts = [tokenizer.decode(new) for new in made]
    for end in stop:
        texts = [text.split(end)[0] for text in texts]
    return texts


def encoded(
    tokenizer: Tokenizer, prompts: Sequence[str], chat: Chat | None = None
) -> list[list[int]]:
    if chat is not None:
        return [opened(tokenizer, prompt, chat) for prompt in prompts]
    return [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]


def compile_ahead(
    restored: Restored,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: Chat | None = None,
) -> None:
    """Compiles what `complete` of the same arguments will run, all of it at the same time.

    On several devices that is the reading of the prompts alone; what comes after depends on where
    that program leaves the cache.

    Args:
      restored: with shapes in the place of its variables, which may be on their way meanwhile.
    Raises:
      UserError: as `generate`.
    """
    model, variables, tokenizer, _ = restored
    tokens = encoded(tokenizer, prompts, chat)
    check(tokens, max_tokens, temperature, top_k, top_p, seed)
    mesh = mesh_of(variables)
    with jax.set_mesh(mesh), concurrent.futures.ThreadPoolExecutor() as pool:
        rows, chunk = batched(tokens)
        longest = max(map(len, rows))

        @functools.cache
        def cache(num_slots: int) -> PyTree:
            sizes = {'batch_size': len(rows), 'cache_length': num_slots}
            lowered = empty_cache.lower(variables, model=model, **sizes)
            return jax.tree.map(placed, lowered.out_info, lowered.compile().output_shardings)

        def program(kind: str, length: int, num_tokens: int) -> concurrent.futures.Future[Any]:
            arrays = [np.zeros((len(rows), length), np.int32)] * 3
            empty = cache(slots_for(num_tokens))
            lowered = extending(kind).lower(variables, empty, *arrays, model=model)
            return pool.submit(lowered.compile)

        reads = program(compiler_options.PREFILL, chunk, min(chunk, longest))
        if mesh.size > 1:
            return
        if max_tokens > 1:
            program(compiler_options.DECODING, 1, longest + 1)
        compiled = reads.result()
        logits = placed(compiled.out_info[0], compiled.output_shardings[0])
        draw.lower(logits, seed, 0, temperature, top_k, top_p).compile()


def placed(array: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)


def warn_of_length(rope: config.Rope, prompt_tokens: int, max_tokens: int) -> None:
    """Warns of a text that would reach past the positions that the model is good for."""
    if prompt_tokens + max_tokens > rope.reach:
        log.warning(
            'The prompt (%d tokens) and max_tokens=%d reach past the %d tokens that the model was '
            'made for; beyond them text decays unless --yarn=dynamic stretches its positions.',
            prompt_tokens, max_tokens, rope.reach,
        )  # fmt: skip
