"""Grouped matmul: each group of rows times its own matrix, by one of several implementations.

IMPLEMENTATIONS has a row for each: `tpu` (our kernels) and `reference` (any device). All compute
three products: rows times weights, rows times transposed weights, which is the gradient of the
rows, and the gradient of the weights. An implementation raises NotImplementedError for what it
cannot take; `auto` takes the first of the platform that can.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from helios_jax.kernels.grouped_matmul import reference, tpu

__all__ = ['IMPLEMENTATIONS', 'GroupedMatmul', 'check', 'choose', 'grouped_matmul']


class GroupedMatmul(NamedTuple):
    """One way to compute the products; kernels/grouped_matmul/reference.py says what they are."""

    platform: str  # the only one that it runs on; '': any
    multiply: Callable[..., Array]  # (rows, weights, group_sizes, *, transposed=False)
    weight_gradient: Callable[..., Array]  # (rows, gradient, group_sizes)
    # Raises NotImplementedError, saying why, if it cannot take all three products of (x, weights).
    able: Callable[[Array, Array], object] | None = None


# In the order in which `auto` tries those of a platform.
IMPLEMENTATIONS = {
    'tpu': GroupedMatmul('tpu', tpu.multiply, tpu.weight_gradient, tpu.able),
    'reference': GroupedMatmul('', reference.multiply, reference.weight_gradient),
}


def grouped_matmul(
    x: Float[Array, 'M D'],
    weights: Float[Array, 'E D F'],
    group_sizes: Int[Array, 'E'],
    *,
    implementation: str = 'auto',
    platform: str | None = None,
) -> Float[Array, 'M F']:
    """Rows of group e times weights[e]; rows are sorted by group.

    Accumulates in float32, returns x.dtype; float32 operands are multiplied exactly. Rows beyond
    sum(group_sizes) belong to no group, and may hold anything: their results and gradients are
    zeros, and so is the gradient of the weights of an empty group. What one group's rows and
    their gradients hold, NaN included, reaches no other group's.

    Args:
      implementation: 'auto', or a name in IMPLEMENTATIONS.
      platform: 'tpu', 'gpu' or 'cpu', where it is compiled for another machine; by default this
        machine's backend.
    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: the implementation that was asked for cannot do this.
    """
    check(x, weights, group_sizes)
    name = choose(x, weights, implementation, platform)
    return differentiable(name, x, weights, group_sizes)


def check(x: Array, weights: Array, group_sizes: Array) -> None:
    """Raises ValueError, naming the argument, for arrays that do not fit together."""
    if x.ndim != 2:
        raise ValueError(f'x has shape {x.shape}, and must have two axes: rows and D.')
    if weights.ndim != 3 or not weights.shape[0] or weights.shape[1] != x.shape[1]:
        raise ValueError(
            f'weights have shape {weights.shape}, and must have [E, {x.shape[1]}, F] for x of '
            f'shape {x.shape}.'
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'x is {x.dtype}, and must be of a floating type.')
    if weights.dtype != x.dtype:
        raise ValueError(f'weights are {weights.dtype}, and must be {x.dtype} as x is.')
    if group_sizes.shape != weights.shape[:1]:
        raise ValueError(
            f'group_sizes have shape {group_sizes.shape}, and must have {weights.shape[:1]}: one '
            'for each matrix of weights.'
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f'group_sizes are {group_sizes.dtype}, and must be integers.')


def choose(x: Array, weights: Array, implementation: str, platform: str | None) -> str:
    """Finds the implementation to take; the choice of 'auto' is logged.

    Raises:
      ValueError: there is no such implementation.
      NotImplementedError: the one that was asked for cannot do this.
    """
    if implementation not in ('auto', *IMPLEMENTATIONS):
        raise ValueError(
            f'implementation={implementation!r}: take auto or {", ".join(IMPLEMENTATIONS)}.'
        )
    platform = platform or jax.default_backend()
    reasons = []
    for name, row in IMPLEMENTATIONS.items():
        if implementation not in ('auto', name):
            continue
        try:
            if row.platform not in ('', platform):
                raise NotImplementedError(f'needs platform {row.platform!r}, not {platform!r}.')
            if row.able:
                row.able(x, weights)
        except NotImplementedError as error:
            if name == implementation:
                raise NotImplementedError(f'grouped_matmul: {name} {error}') from error
            if row.platform == platform:
                reasons.append(f'{name} {error}')
            continue
        if implementation == 'auto':
            log_choice(name, platform, tuple(reasons))
        return name
    raise AssertionError(f'the reference can do everything: {" ".join(reasons)}')


@functools.cache
def log_choice(name: str, platform: str, reasons: tuple[str, ...]) -> None:
    """Logs each choice once, however often the model is traced."""
    slow = platform != 'cpu' and not IMPLEMENTATIONS[name].platform
    text = f'grouped_matmul: {"SLOW " if slow else ""}{name} on {platform}'
    if slow:
        reasons = (*reasons, 'XLA computes every expert densely.')
    text = ': '.join((text, ' '.join(reasons))) if reasons else f'{text}.'
    logging.getLogger(__name__).log(logging.WARNING if slow else logging.INFO, text)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(name: str, x: Array, weights: Array, group_sizes: Array) -> Array:
    return IMPLEMENTATIONS[name].multiply(x, weights, group_sizes)


def forward_rule(name: str, x: Array, weights: Array, group_sizes: Array) -> tuple[Array, tuple]:
    return differentiable(name, x, weights, group_sizes), (x, weights, group_sizes)


def backward_rule(name: str, saved: tuple, gradient: Array) -> tuple[Array, Array, None]:
    x, weights, group_sizes = saved
    chosen = IMPLEMENTATIONS[name]
    return (
        chosen.multiply(gradient, weights, group_sizes, transposed=True),
        chosen.weight_gradient(x, gradient, group_sizes),
        None,
    )


differentiable.defvjp(forward_rule, backward_rule)
