"""Eight simulated devices, checked annotations, and no silent broadcasting, in every test."""

import contextlib
import os

# Interpreted kernels hold a thread of XLA's pool while they wait for another, which copies their
# arguments: with no more threads than devices, all of which may wait, they wait for ever.
os.environ.setdefault('NPROC', '32')
# LLVM takes less time for a small program as a whole than in the 32 pieces that it is cut into.
os.environ.setdefault('XLA_FLAGS', '--xla_cpu_parallel_codegen_split_count=1')

from jaxtyping import install_import_hook

install_import_hook('helios_jax', 'beartype.beartype')

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

# A machine may be busy: no example has a time limit.
hypothesis.settings.register_profile('without_deadline', deadline=None)
hypothesis.settings.load_profile('without_deadline')

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@contextlib.contextmanager
def settings(**values):
    """JAX's settings, and a cache of programs that follows them, as long as it lasts."""
    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def quick_compilation():
    """Compiles with few of XLA's optimizations, for modules that run nothing large.

    `pytestmark = pytest.mark.usefixtures('quick_compilation')` takes it for a module, and what its
    other fixtures compile.
    """
    with settings(jax_disable_most_optimizations=True):
        yield


@pytest.fixture(scope='session')
def kept_programs(tmp_path_factory):
    """Settings of whole runs: `quick_compilation`, and no program is compiled twice."""
    directory = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        directory = directory.parent  # of all workers
    return {
        'jax_disable_most_optimizations': True,
        'jax_compilation_cache_dir': str(directory / 'programs'),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }


@pytest.fixture(scope='module')
def quick_runs(kept_programs):
    """`quick_compilation` for modules of whole runs, which compile the same programs many times."""
    with settings(**kept_programs):
        yield


@pytest.fixture(scope='session')
def root(tmp_path_factory, kept_programs):
    """A finished run and its like (`tests/support/cli_root.py`); tests write to its cache only."""
    import cli_root

    with settings(**kept_programs):
        return cli_root.make(tmp_path_factory.mktemp('cli'))
