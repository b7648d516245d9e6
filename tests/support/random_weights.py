"""Weights without compiling an initialiser."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def random_weights(shapes: Any, seed: int = 0) -> Any:
    """Arrays of a tree's shapes in which nothing is zero or one, gates and scales included."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        value = rng.normal(size=leaf.shape)
        if path[-1].key == 'scale':
            value = 1 + 0.2 * value
        elif path[-1].key == 'w' and path[-2].key != 'embed':
            value = 0.2 * value  # 1/√fan_in for the sizes that tests take
        else:
            value = 0.5 * value
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, nn.unbox(shapes))
