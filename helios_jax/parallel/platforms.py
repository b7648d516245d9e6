"""Differences between the platforms that a program runs on: tpu, gpu, cpu."""

import jax


def has_host_memory(platform: str = '') -> bool:
    """True if offloading moves anything: a CPU's memory is the host's already.

    Args:
      platform: '' is the running one.
    """
    return (platform or jax.default_backend()) != 'cpu'
