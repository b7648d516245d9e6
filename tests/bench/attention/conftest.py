"""What tests of the attention bench share."""

import jax
import pytest

from helios_jax.bench.attention import tokamax as candidates


@pytest.fixture
def tokamax():
    """Our module of it, where it is installed; tokamax adds arrays of different ranks."""
    if reason := candidates.missing():
        pytest.skip(reason)
    with jax.numpy_rank_promotion('allow'):
        yield candidates
