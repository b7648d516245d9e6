"""Weights without compiling an initialiser, and compiling without optimising: both for time."""

import jax
import pytest
from random_weights import random_weights


@pytest.fixture(autouse=True, scope='module')
def always_quickly(quick_compilation):
    """These tests run nothing large: they spend their time compiling."""


@pytest.fixture(scope='session')
def random_variables():
    """Variables of a module's shapes in which nothing is zero or one, gates and scales included."""

    def make(module, *args, seed=0, **kwargs):
        init = lambda *args: module.init(jax.random.key(0), *args, **kwargs)
        return random_weights(jax.eval_shape(init, *args), seed)

    return make
