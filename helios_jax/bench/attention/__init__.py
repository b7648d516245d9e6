"""Attention on a TPU by the compiler's schedules: our kernels beside jax's and tokamax's."""
