"""A model with a cache of unrotated keys: reads prompts in chunks, then token by token.

Prompts of any lengths share a batch: each row has positions of its own, and padding writes
nothing. A query attends to every slot of the cache, so the cache is made no larger than its content
needs, and doubled when it is full. Two programs are compiled for each of its sizes, one for a chunk
of the prompt and one for a single token, whatever the lengths.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from helios_jax.arch import rules
from helios_jax.model.loss import project
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import compiler_options

PREFILL_CHUNK = 256  # tokens
SMALLEST_CACHE = 1024  # slots; attending to fewer would save less than compiling once more costs


@functools.cache
def extending(program: str) -> Any:
    """Makes `extend` a program as this machine's chips want it.

    Args:
      program: compiler_options.PREFILL, which runs once a chunk, or DECODING, once a token.
    """
    options = compiler_options.resolve(jax.local_devices()[0], program)
    return jax.jit(
        extend,
        static_argnames=('model',),
        donate_argnames=('cache',),
        compiler_options=options,
    )


def extend(
    variables: PyTree,
    cache: PyTree,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'],
    real: Int[Array, 'B T'],
    *,
    model: Transformer,
) -> tuple[Float[Array, 'B V'], PyTree]:
    """Reads tokens into the cache; returns the logits after each row's last real token."""
    output: Any = model.apply(
        {**variables, 'cache': cache},
        tokens,
        positions,
        real,
        cache_length=num_slots(cache),
        mutable=['cache'],
    )
    (hidden, _), written = output
    last = jnp.maximum(real.sum(axis=1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    head: Any = model.apply(variables, method='unembedding_weight')
    return project(hidden, head, model.model.vocab_size)[:, 0], written['cache']


@functools.partial(jax.jit, static_argnames=('model', 'batch_size', 'cache_length'))
def empty_cache(
    variables: PyTree, *, model: Transformer, batch_size: int, cache_length: int
) -> PyTree:
    """Makes zeroed keys and values, [B, cache_length, K, H] a layer, on the mesh that is set."""
    tokens = jnp.zeros((batch_size, num_shards('length')), jnp.int32)

    def shapes() -> PyTree:
        _, made = model.apply(
            variables, tokens, tokens, tokens, cache_length=cache_length, mutable=['cache']
        )
        return made['cache']

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(shapes))


def num_slots(cache: PyTree) -> int:
    """Number of positions that a cache has room for."""
    return jax.tree.leaves(cache)[0].shape[-3]


def slots_for(num_tokens: int) -> int:
    """Number of cache slots for so many tokens: a power of two, so that few sizes are compiled."""
    return max(SMALLEST_CACHE, 1 << (num_tokens - 1).bit_length())


def with_room(cache: PyTree, num_tokens: int) -> PyTree:
    """Returns the cache, grown to `slots_for` these tokens if it is smaller."""
    missing = slots_for(num_tokens) - num_slots(cache)
    if missing <= 0:
        return cache

    def grow(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[-3] = (0, missing)
        return jnp.pad(x, widths)

    return jax.tree.map(grow, cache)


def prefill(
    model: Transformer,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    chunk: int = PREFILL_CHUNK,
) -> tuple[Float[Array, 'B V'], PyTree]:
    """Reads prompts in chunks; returns the logits after each one, and the cache."""
    lengths = np.array([len(p) for p in prompts])
    longest = int(lengths.max())
    slots = slots_for(min(chunk, longest))
    cache = empty_cache(variables, model=model, batch_size=len(prompts), cache_length=slots)
    logits = None
    for start in range(0, longest, chunk):
        cache = with_room(cache, min(start + chunk, longest))
        positions = np.broadcast_to(
            np.arange(start, start + chunk, dtype=np.int32), (len(prompts), chunk)
        )
        real = np.less(positions, lengths[:, None])
        tokens = np.zeros_like(positions)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + chunk]
            tokens[row, : len(piece)] = piece
        new, cache = extending(compiler_options.PREFILL)(
            variables, cache, tokens, positions, real.astype(np.int32), model=model
        )
        ends_here = real.any(axis=1)[:, None]
        logits = new if logits is None else jnp.where(ends_here, new, logits)
    assert logits is not None
    return logits, cache


def batched(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], int]:
    """Returns the prompts, with as many more as the mesh asks for, and the tokens of a chunk."""
    rows = [*prompts, *[prompts[0]] * (-len(prompts) % num_shards('batch'))]
    chunk = min(PREFILL_CHUNK, 1 << (max(map(len, rows)) - 1).bit_length())
    return rows, chunk + -chunk % num_shards('length')


def num_shards(name: str) -> int:
    """Number of shards that the mesh that is set cuts a logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else rules.shards(mesh, name)
