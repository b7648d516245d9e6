"""Eight simulated devices, checked annotations, and no silent broadcasting, in every test."""

import os

# Interpreted kernels hold a thread of XLA's pool while they wait for another, which copies their
# arguments: with no more threads than devices, all of which may wait, they wait for ever.
os.environ.setdefault('NPROC', '32')

from jaxtyping import install_import_hook

install_import_hook('helios_jax', 'beartype.beartype')

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
