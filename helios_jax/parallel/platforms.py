"""Differences between the platforms that a program is compiled for: tpu, gpu, cpu."""

from typing import Any

import jax


def has_host_memory(platform: str = '') -> bool:
    """True if offloading moves anything: a CPU's memory is the host's already.

    Args:
      platform: '' is the running one.
    """
    return (platform or jax.default_backend()) != 'cpu'


def compiler_options(*, transfers: bool) -> dict[str, Any]:
    """Options for XLA to compile a step with, on the running platform.

    Args:
      transfers: True if the step moves arrays to and from the host. A GPU then must not record a
        loop's kernels and copies as one graph, or they run one by one.
    """
    if transfers and jax.default_backend() == 'gpu':
        return {'xla_gpu_enable_command_buffer': ''}
    return {}
