"""Sampling from a model with a cache of unrotated keys.

Prompts of any lengths share a batch: each row has positions of its own, and what is padding writes
nothing. Two programs are compiled, one for a chunk of the prompt and one for a single token,
whatever the lengths.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from helios_jax.arch import rules
from helios_jax.config import require
from helios_jax.model.loss import project
from helios_jax.model.transformer import Transformer
from helios_jax.parallel.sharding import constrain
from helios_jax.restoring import Restored, mesh_of

PREFILL_CHUNK = 256  # tokens


@functools.partial(jax.jit, static_argnames=('model', 'cache_length'), donate_argnames=('cache',))
def extend(
    variables: PyTree,
    cache: PyTree,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'],
    real: Int[Array, 'B T'],
    *,
    model: Transformer,
    cache_length: int,
) -> tuple[Float[Array, 'B V'], PyTree]:
    """Reads tokens into the cache; returns the logits behind each row's last real token."""
    output: Any = model.apply(
        {**variables, 'cache': cache},
        tokens,
        positions,
        real,
        cache_length=cache_length,
        mutable=['cache'],
    )
    (hidden, _), written = output
    last = jnp.maximum(real.sum(axis=1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    head: Any = model.apply(variables, method='unembedding_weight')
    return project(hidden, head, model.model.vocab_size)[:, 0], written['cache']


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
      top_k: only the k most likely; 0 is all.
      top_p: only the fewest most likely ones whose probability reaches this; 1 is all.
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


def empty_cache(
    model: Transformer, variables: PyTree, batch_size: int, cache_length: int
) -> PyTree:
    """Zeroed keys and values, [B, cache_length, K, H] of each layer, on the mesh that is set."""
    tokens = jnp.zeros((batch_size, _parts('length')), jnp.int32)

    def shapes() -> PyTree:
        _, made = model.apply(
            variables, tokens, tokens, tokens, cache_length=cache_length, mutable=['cache']
        )
        return made['cache']

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(shapes))


def prefill(
    model: Transformer,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    cache_length: int,
    chunk: int = PREFILL_CHUNK,
) -> tuple[Float[Array, 'B V'], PyTree]:
    """Reads prompts in chunks; returns the logits behind each one, and the cache."""
    lengths = np.array([len(p) for p in prompts])
    cache = empty_cache(model, variables, len(prompts), cache_length)
    logits = None
    for start in range(0, int(lengths.max()), chunk):
        positions = np.broadcast_to(
            np.arange(start, start + chunk, dtype=np.int32), (len(prompts), chunk)
        )
        real = np.less(positions, lengths[:, None])
        tokens = np.zeros_like(positions)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + chunk]
            tokens[row, : len(piece)] = piece
        new, cache = extend(
            variables, cache, tokens, positions, real.astype(np.int32),
            model=model, cache_length=cache_length,
        )  # fmt: skip
        ends_here = real.any(axis=1)[:, None]
        logits = new if logits is None else jnp.where(ends_here, new, logits)
    assert logits is not None
    return logits, cache


def generate(
    model: Transformer,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stopped: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids, BOS included) by up to `max_tokens` tokens.

    A row ends before EOS, or when `stopped(row, its new tokens)` says so.

    Raises:
      UserError: an empty prompt, or a sampling setting out of range.
    """
    require(all(len(p) > 0 for p in prompts) and len(prompts) > 0, 'a prompt has no token at all.')
    require(max_tokens > 0, f'max_tokens={max_tokens} must be above 0.')
    require(temperature >= 0, f'temperature={temperature} must be 0 (greedy) or more.')
    require(0 < top_p <= 1, f'top_p={top_p} must lie above 0 and at most 1.')
    require(top_k >= 0, f'top_k={top_k} must be 0 (all) or more.')
    wanted = len(prompts)
    prompts = [*prompts, *[prompts[0]] * (-wanted % _parts('batch'))]
    longest = max(len(p) for p in prompts) + max_tokens
    # A power of two, so that a longer request seldom compiles anew.
    cache_length = max(PREFILL_CHUNK, 1 << (longest - 1).bit_length())
    chunk = min(PREFILL_CHUNK, 1 << (max(len(p) for p in prompts) - 1).bit_length())
    # The mesh may divide the sequence: what a call reads is padded to what it divides.
    padding = (0, 0), (0, _parts('length') - 1)
    chunk += -chunk % _parts('length')

    logits, cache = prefill(model, variables, prompts, cache_length, chunk)
    positions = np.array([len(p) for p in prompts], np.int32)
    output: list[list[int]] = [[] for _ in prompts]
    alive = np.arange(len(prompts)) < wanted
    key = jax.random.key(seed)
    for count in range(max_tokens):
        drawn = sample(logits, jax.random.fold_in(key, count), temperature, top_k, top_p)
        tokens = np.asarray(drawn)
        for row in np.flatnonzero(alive):
            if tokens[row] == eos_id:
                alive[row] = False
                continue
            output[row].append(int(tokens[row]))
            if stopped and stopped(int(row), output[row]):
                alive[row] = False
        if not alive.any() or count == max_tokens - 1:
            break
        logits, cache = extend(
            variables,
            cache,
            *(np.pad(x[:, None].astype(np.int32), padding) for x in (tokens, positions, alive)),
            model=model,
            cache_length=cache_length,
        )
        positions += 1
    return output[:wanted]


def _parts(name: str) -> int:
    """Number of parts that the mesh that is set cuts a logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else rules.shards(mesh, name)


def complete(
    restored: Restored, prompts: Sequence[str], *, stop: Sequence[str] = (), **settings: Any
) -> list[str]:
    """The texts that continue `prompts`, each cut before the first of the `stop` texts.

    Args:
      settings: of `generate`.
    """
    model, variables, tokenizer, _ = restored
    require(all(stop), 'stop is empty, which every text ends with; name some text.')

    def stopped(_: int, tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens)
        return any(end in text for end in stop)

    with jax.set_mesh(mesh_of(variables)):
        made = generate(
            model,
            variables,
            [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts],
            eos_id=tokenizer.eos_id,
            stopped=stopped if stop else None,
            **settings,
        )
    texts = [tokenizer.decode(tokens) for tokens in made]
    for end in stop:
        texts = [text.split(end)[0] for text in texts]
    return texts
