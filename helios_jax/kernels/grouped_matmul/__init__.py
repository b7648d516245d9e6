"""Grouped matmul: each group of rows times its own matrix, by one of several implementations.

IMPLEMENTATIONS has a row for each: `tpu` and `hopper` (our kernels), `reference` (any device). All
compute three products: rows times weights, rows times transposed weights, which is the gradient of
the rows, and the gradient of the weights. An implementation raises NotImplementedError for what it
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

from helios_jax.arch.grouped_matmul import ROWS, Support
from helios_jax.kernels.grouped_matmul import hopper, reference, tpu

__all__ = ['IMPLEMENTATIONS', 'GroupedMatmul', 'check', 'choose', 'grouped_matmul']


class GroupedMatmul(NamedTuple):
    """One way to compute the products; kernels/grouped_matmul/reference.py says what they are."""

    row: Support
    multiply: Callable[..., Array]  # (rows, weights, group_sizes, *, transposed=False)
    weight_gradient: Callable[..., Array]  # (rows, gradient, group_sizes)
    # Raises NotImplementedError, saying why, if sizes of (x, weights) are too large for a product.
    able: Callable[[Array, Array], object] | None = None

    def check(self, x: Array, weights: Array, platform: str) -> None:
        """Raises NotImplementedError, saying why, if it cannot take all three products."""
        reason = self.row.refusal(platform, str(x.dtype), weights.shape[1:], capability(platform))
        if reason:
            raise NotImplementedError(reason)
        if self.able:
            self.able(x, weights)


IMPLEMENTATIONS = {
    'tpu': GroupedMatmul(ROWS['tpu'], tpu.multiply, tpu.weight_gradient, tpu.able),
    'hopper': GroupedMatmul(ROWS['hopper'], hopper.multiply, hopper.weight_gradient),
    'reference': GroupedMatmul(ROWS['reference'], reference.multiply, reference.weight_gradient),
}


def capability(platform: str) -> str:
    """Compute capability of this machine's GPU, if it is what is compiled for; else ''."""
    device = jax.devices()[0]
    return device.compute_capability if platform == device.platform == 'gpu' else ''


def grouped_matmul(
    x: Float[Array, 'M _'],
    weights: Float[Array, 'E D F'],
    group_sizes: Int[Array, 'E'],
    *,
    transposed: bool = False,
    implementation: str = 'auto',
    platform: str | None = None,
) -> Float[Array, 'M _']:
    """Rows of group e times weights[e]; rows are sorted by group.

    Accumulates in float32, returns x.dtype; float32 operands are multiplied exactly. Rows beyond
    sum(group_sizes) belong to no group, and may hold anything: their results and gradients are
    zeros, and so is the gradient of the weights of an empty group. What one group's rows and
    their gradients hold, NaN included, reaches no other group's.

    Args:
      transposed: multiply with the transpose of weights[e], of which no copy is made: x [M F] gives
        [M D].
      implementation: 'auto', or a name in IMPLEMENTATIONS.
      platform: 'tpu', 'gpu' or 'cpu', where it is compiled for another machine; by default this
        machine's backend.
    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: the implementation that was asked for cannot do this.
    """
    check(x, weights, group_sizes, transposed=transposed)
    name = choose(x, weights, implementation, platform)
    return differentiable(name, transposed, x, weights, group_sizes)


def check(x: Array, weights: Array, group_sizes: Array, *, transposed: bool = False) -> None:
    """Raises ValueError, naming the argument, for arrays that do not fit together."""
    if x.ndim != 2:
        raise ValueError(f'x has shape {x.shape}, and must have two axes: rows and D.')
    depth = 2 if transposed else 1
    if weights.ndim != 3 or not weights.shape[0] or weights.shape[depth] != x.shape[1]:
        wanted = f'[E, D, {x.shape[1]}]' if transposed else f'[E, {x.shape[1]}, F]'
        raise ValueError(
            f'weights have shape {weights.shape}, and must have {wanted} for x of shape {x.shape}.'
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
    for name, found in IMPLEMENTATIONS.items():
        if implementation not in ('auto', name):
            continue
        try:
            found.check(x, weights, platform)
        except NotImplementedError as error:
            if name == implementation:
                raise NotImplementedError(f'grouped_matmul: {name} {error}') from error
            if found.row.platform == platform:
                reasons.append(f'{name} {error}')
            continue
        if implementation == 'auto':
            log_choice(name, platform, tuple(reasons))
        return name
    raise AssertionError(f'the reference can do everything: {" ".join(reasons)}')


@functools.cache
def log_choice(name: str, platform: str, reasons: tuple[str, ...]) -> None:
    """Logs each choice once, however often the model is traced."""
    slow = platform != 'cpu' and IMPLEMENTATIONS[name].row.dense
    text = f'grouped_matmul: {"SLOW " if slow else ""}{name} on {platform}'
    if slow:
        reasons = (*reasons, 'XLA computes every expert densely.')
    text = ': '.join((text, ' '.join(reasons))) if reasons else f'{text}.'
    logging.getLogger(__name__).log(logging.WARNING if slow else logging.INFO, text)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(
    name: str, transposed: bool, x: Array, weights: Array, group_sizes: Array
) -> Array:
    return IMPLEMENTATIONS[name].multiply(x, weights, group_sizes, transposed=transposed)


def forward_rule(
    name: str, transposed: bool, x: Array, weights: Array, group_sizes: Array
) -> tuple[Array, tuple]:
    return differentiable(name, transposed, x, weights, group_sizes), (x, weights, group_sizes)


def backward_rule(
    name: str, transposed: bool, saved: tuple, gradient: Array
) -> tuple[Array, Array, None]:
    x, weights, group_sizes = saved
    chosen = IMPLEMENTATIONS[name]
    pair = (gradient, x) if transposed else (x, gradient)
    return (
        chosen.multiply(gradient, weights, group_sizes, transposed=not transposed),
        chosen.weight_gradient(*pair, group_sizes),
        None,
    )


differentiable.defvjp(forward_rule, backward_rule)
