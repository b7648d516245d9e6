"""Weights without compiling an initialiser, and compiling without optimising: both for time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """These tests run nothing large: they spend their time compiling."""
    before = jax.config.values['jax_disable_most_optimizations']
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='session')
def random_variables():
    """Variables of a module's shapes in which nothing is zero or one, gates and scales included."""

    def make(module, *args, seed=0, **kwargs):
        init = lambda *args: module.init(jax.random.key(0), *args, **kwargs)  # noqa: E731
        shapes = nn.unbox(jax.eval_shape(init, *args))
        rng = np.random.default_rng(seed)

        def fill(path, leaf):
            value = rng.normal(size=leaf.shape)
            if path[-1].key == 'scale':
                value = 1 + 0.2 * value
            elif path[-1].key == 'w' and path[-2].key != 'embed':
                value = 0.2 * value  # 1/√fan_in for the sizes that tests take
            else:
                value = 0.5 * value
            return jnp.asarray(value, leaf.dtype)

        return jax.tree_util.tree_map_with_path(fill, shapes)

    return make
