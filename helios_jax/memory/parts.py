"""Functions whose backward pass takes a part of their arguments at a time.

    for i < n:   da, db += vjp(f; aᵢ, bᵢ)(dyᵢ)

Nothing is saved but the arguments, and of what the backward pass computes only a part is there at
once. Two kinds of function have such parts: one that treats each token alone is cut along the
tokens, and gradients of its weights add up; a gated MLP is cut along its hidden channels, and the
gradients of its input add up (over tokens: Liu & Abbeel, 2305.19370). The values are those of the
function itself; only its gradient's sums are in another order.

The parts follow each other in a loop, whose end also keeps XLA from putting gradients of weights
off until long after, with all that they read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from helios_jax.parallel.sharding import shards


class Cut(NamedTuple):
    """Where an array is cut into parts."""

    axis: int
    name: str  # its logical axis: each device cuts its own share


class Parts(NamedTuple):
    """How a function of several arguments and one result is cut."""

    number: int
    arguments: tuple[Cut | None, ...]  # of every array of each; None: whole
    result: Cut | None  # None: it is the sum of the parts' results


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def in_parts(
    function: Callable[..., Array], backward: Parts, forward: Parts | None, *arguments: PyTree
) -> Array:
    """function(*arguments), differentiable in all of them, a part at a time.

    The gradient of an argument that is not cut is the sum over the parts, in float32.

    Args:
      forward: parts of the forward pass where it is differentiated, whose result is cut; None: the
        function as it is.
    """
    return function(*arguments)


def _forward(
    function: Callable[..., Array], backward: Parts, forward: Parts | None, *arguments: PyTree
) -> tuple[Array, Any]:
    if forward is None:
        return function(*arguments), arguments
    each, out = _views(forward, arguments), jax.eval_shape(function, *arguments)
    result = forward.result

    def step(i: Any, whole: Array) -> Array:
        return _add(result, forward.number, i, whole, function(*_taken(forward, i, each)))

    start = _view(result, jnp.zeros(out.shape, out.dtype))
    whole = jax.lax.fori_loop(0, forward.number, step, start)
    return whole.reshape(out.shape), arguments


def _backward(
    function: Callable[..., Array],
    backward: Parts,
    forward: Parts | None,
    arguments: Any,
    cotangent: Array,
) -> Any:
    each, cuts = _views(backward, arguments), backward.arguments
    d_out = _view(backward.result, cotangent)

    def step(i: Any, totals: Any) -> Any:
        _, vjp = jax.vjp(function, *_taken(backward, i, each))
        found = vjp(_take(backward.result, backward.number, i, d_out))
        return [
            jax.tree.map(partial(_add, cut, backward.number, i), total, gradient)
            for cut, total, gradient in zip(cuts, totals, found, strict=True)
        ]

    start = [jax.tree.map(partial(_zeros, cut), a) for cut, a in zip(cuts, each, strict=True)]
    totals = jax.lax.fori_loop(0, backward.number, step, start)
    return tuple(
        jax.tree.map(lambda total, a: total.reshape(a.shape).astype(a.dtype), total, a)
        for total, a in zip(totals, arguments, strict=True)
    )


in_parts.defvjp(_forward, _backward)


def _views(parts: Parts, arguments: Any) -> list[Any]:
    return [
        jax.tree.map(partial(_view, cut), a)
        for cut, a in zip(parts.arguments, arguments, strict=True)
    ]


def _taken(parts: Parts, i: Any, views: list[Any]) -> list[Any]:
    return [
        jax.tree.map(partial(_take, cut, parts.number, i), a)
        for cut, a in zip(parts.arguments, views, strict=True)
    ]


def _view(cut: Cut | None, a: Array) -> Array:
    """The cut axis as two, the devices' and what each has of it."""
    if cut is None:
        return a
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else shards(mesh, cut.name)
    return a.reshape(*a.shape[: cut.axis], devices, -1, *a.shape[cut.axis + 1 :])


def _take(cut: Cut | None, number: int, i: Any, a: Array) -> Array:
    """Part i of a view, the cut axis one again."""
    if cut is None:
        return a
    size = a.shape[cut.axis + 1] // number
    own = jax.lax.dynamic_slice_in_dim(a, i * size, size, cut.axis + 1)
    return own.reshape(*a.shape[: cut.axis], -1, *a.shape[cut.axis + 2 :])


def _zeros(cut: Cut | None, a: Array) -> Array:
    # A sum over parts is float32, whatever its terms are.
    return jnp.zeros(a.shape, a.dtype if cut else jnp.promote_types(a.dtype, jnp.float32))


def _add(cut: Cut | None, number: int, i: Any, total: Array, part: Array) -> Array:
    """Part i of a view of the total replaced by `part`, or a sum with it."""
    if cut is None:
        return total + part.astype(total.dtype)
    axis = cut.axis + 1
    size = total.shape[axis] // number
    own = part.reshape(*total.shape[:axis], size, *total.shape[axis + 1 :])
    return jax.lax.dynamic_update_slice_in_dim(total, own, i * size, axis)
