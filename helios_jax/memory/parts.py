"""Functions whose backward pass takes a part of their arguments at a time.

    for i < n:   da, db += vjp(f; aᵢ, bᵢ)(dyᵢ)

Nothing is saved but the arguments, and of what the backward pass computes only a part is there at
once. Two kinds of function have such parts: one that treats each token alone is cut along the
tokens, and gradients of its weights add up; a gated MLP is cut along its hidden channels, and the
gradients of its input add up (over tokens: Liu & Abbeel, 2305.19370). Over hidden channels each
weight's gradient is made once, and crosses the network once. The value is the function's own bit
for bit; only its gradient's sums are in another order.

The parts follow each other in a loop, whose end also keeps XLA from putting gradients of weights
off until long after, with all that they read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from helios_jax.arch.rules import shards


class Cut(NamedTuple):
    """One cut of an array into parts: its axis."""

    axis: int
    name: str  # logical name of that axis: each device cuts its own share


class Parts(NamedTuple):
    """Cuts of a function's arguments and of its one result."""

    number: int
    arguments: tuple[Cut | None, ...]  # cuts of every array of each argument; None: whole
    result: Cut | None  # None: it is the sum of the parts' results


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_parts(function: Callable[..., Array], parts: Parts, *arguments: PyTree) -> Array:
    """Computes function(*arguments), differentiable in all of them, backward a part at a time.

    The gradient of an argument that is not cut is the sum over the parts, in float32.
    """
    return function(*arguments)


def _forward(
    function: Callable[..., Array], parts: Parts, *arguments: PyTree
) -> tuple[Array, tuple[PyTree, ...]]:
    return function(*arguments), arguments


def _backward(
    function: Callable[..., Array], parts: Parts, arguments: tuple[PyTree, ...], d_out: Array
) -> tuple[PyTree, ...]:
    each = lambda f, *trees: [
        jax.tree.map(partial(f, cut), *own)
        for cut, *own in zip(parts.arguments, *trees, strict=True)
    ]
    view = partial(_view, parts.number)
    views, d_views = each(view, arguments), view(parts.result, d_out)

    def step(i: Any, totals: Any) -> Any:
        _, vjp = jax.vjp(function, *each(partial(_take, i), views))
        return each(partial(_add, i), totals, vjp(_take(i, parts.result, d_views)))

    totals = jax.lax.fori_loop(0, parts.number, step, each(_zeros, views))
    whole = lambda _, total, a: total.reshape(a.shape).astype(a.dtype)
    return tuple(each(whole, totals, arguments))


in_parts.defvjp(_forward, _backward)


def _view(number: int, cut: Cut | None, a: Array) -> Array:
    """Splits the cut axis into three: devices, parts, the rest."""
    if cut is None:
        return a
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else shards(mesh, cut.name)
    return a.reshape(*a.shape[: cut.axis], devices, number, -1, *a.shape[cut.axis + 1 :])


def _take(i: Any, cut: Cut | None, a: Array) -> Array:
    """Takes part i of a view, with the cut axis as one axis again."""
    if cut is None:
        return a
    own = jax.lax.dynamic_index_in_dim(a, i, cut.axis + 1, keepdims=False)
    return own.reshape(*a.shape[: cut.axis], -1, *a.shape[cut.axis + 3 :])


def _zeros(cut: Cut | None, a: Array) -> Array:
    # A sum over parts is float32, whatever its terms are.
    return jnp.zeros(a.shape, a.dtype if cut else jnp.promote_types(a.dtype, jnp.float32))


def _add(i: Any, cut: Cut | None, total: Array, part: Array) -> Array:
    """Writes `part` as part i of a view, or adds it to a sum that is not cut."""
    if cut is None:
        return total + part.astype(total.dtype)
    own = part.reshape(*total.shape[: cut.axis + 1], *total.shape[cut.axis + 2 :])
    return jax.lax.dynamic_update_index_in_dim(total, own, i, cut.axis + 1)
