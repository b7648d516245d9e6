"""ln p of each token of one row, from all logits of this row alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_restored

PADDED = 128  # tokens: rows are padded to a multiple, so that few shapes are compiled


@functools.cache
def logits(length: int):
    made = tiny_restored.restored()
    apply = jax.jit(functools.partial(made.model.apply, method='logits'))
    return lambda row: apply(made.variables, row, jnp.arange(length)[None])


@functools.cache
def log_p(tokens: tuple[int, ...]) -> np.ndarray:
    """ln p [T V] of the token after each, in float64."""
    length = -(-len(tokens) // PADDED) * PADDED
    row = jnp.zeros((1, length), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
    found = np.asarray(logits(length)(row)[0, : len(tokens), :256], np.float64)
    return found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
