"""Eight simulated devices, checked annotations, and no silent broadcasting, in every test."""

import contextlib
import os

# Interpreted kernels hold a thread of XLA's pool while they wait for another, which copies their
# arguments: with no more threads than devices, all of which may wait, they wait for ever.
os.environ.setdefault('NPROC', '32')

from jaxtyping import install_import_hook

install_import_hook('helios_jax', 'beartype.beartype')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@contextlib.contextmanager
def compiling_quickly():
    before = jax.config.values['jax_disable_most_optimizations']
    jax.config.update('jax_disable_most_optimizations', True)
    try:
        yield
    finally:
        jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='module')
def quick_compilation():
    """Compiles with few of XLA's optimizations, for modules that run nothing large.

    `pytestmark = pytest.mark.usefixtures('quick_compilation')` takes it for a module, and what its
    other fixtures compile.
    """
    with compiling_quickly():
        yield


@pytest.fixture(scope='session')
def root(tmp_path_factory):
    """A finished run and its like (`tests/support/cli_root.py`); tests write to its cache only."""
    import cli_root

    with compiling_quickly():
        return cli_root.make(tmp_path_factory.mktemp('cli'))
