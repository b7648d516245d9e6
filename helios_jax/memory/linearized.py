"""A function taken apart for differentiation: what its backward pass reads, each under its name.

`jax.vjp` of a `jax.checkpoint`ed function is a pytree whose leaves are the tensors that the policy
saves and the function's own arguments. The leaves have no names, so the function is traced once and
each leaf followed back through the jaxpr: to an argument, or to the `checkpoint_name` (or the
kernel) that made it. Leaves that only feed computations which the backward pass does not need, such
as a kernel whose results are all saved, are dropped before anything is stored.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from helios_jax.memory import jaxprs


class Leaf(NamedTuple):
    """Origin of one leaf of a vjp."""

    place: int  # among the forward jaxpr's outputs
    twin: int  # the first leaf that is the same array: its own index if there is none before
    argument: int  # which of the flat arguments other than x, −1 if it is none
    constant: int  # which of the jaxpr's constants, −1 if it is none
    name: str  # of the tensor, '' if it has none
    local: tuple[int, ...] | None  # its shape on one device, where a shard_map made it


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """Forward and backward pass of function(params, x, *others), for gradients in params and x."""

    jaxpr: jex.ClosedJaxpr  # arguments → the function's value, the leaves
    out_tree: Any
    leaves: tuple[Leaf, ...]  # those that the backward pass reads
    transposed: jex.ClosedJaxpr  # these leaves, cotangents of the value → gradients
    gradient_tree: Any

    def forward(self, *arguments: Any) -> tuple[Any, list[Any]]:
        """Returns the function's value and the leaves of its vjp."""
        values = jex.jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(arguments))
        value = jax.tree.unflatten(self.out_tree, values[: self.out_tree.num_leaves])
        return value, [values[leaf.place] for leaf in self.leaves]

    def dtype(self, leaf: Leaf) -> Any:
        return self.jaxpr.out_avals[leaf.place].dtype

    def backward(self, leaves: list[Any], cotangents: Any) -> Any:
        """Gradients of params and x."""
        run = jex.jaxpr_as_fun(self.transposed)
        return jax.tree.unflatten(self.gradient_tree, run(*leaves, *jax.tree.leaves(cotangents)))


def linearize(
    function: Callable[..., Any],
    table: Mapping[str, str],
    input_name: str,
    params: Any,
    x: Any,
    *others: Any,
) -> Linearized:
    """Traces function(params, x, *others), of arrays or shapes, under the table's policy.

    Args:
      table: tensor name → action.
      input_name: what x is called in the table.
      x: an array, or several.
    """
    saves = checkpoint_policy(table)
    checkpointed = jax.checkpoint(function, policy=saves, prevent_cse=False)

    def run(params: Any, x: Any, *others: Any) -> Any:
        return jax.vjp(lambda params, x: checkpointed(params, x, *others), params, x)

    closed, (out, vjp) = jax.make_jaxpr(run, return_shape=True)(params, x, *others)
    shapes, vjp_tree = jax.tree.flatten(vjp)
    back, gradients = jax.make_jaxpr(
        lambda leaves, cotangents: jax.tree.unflatten(vjp_tree, leaves)(cotangents),
        return_shape=True,
    )(shapes, out)
    num_leaves = len(shapes)
    removable = [True] * num_leaves + [False] * _size(out)  # the cotangents stay, read or not
    transposed, used = jaxprs.without_dead_code(back, removable)
    return Linearized(
        closed,
        jax.tree.structure(out),
        tuple(
            _leaves(
                closed.jaxpr, used[:num_leaves], _size(out), _size(params), _size(x), input_name
            )
        ),
        transposed,
        jax.tree.structure(gradients),
    )


def checkpoint_policy(table: Mapping[str, str]) -> Callable[..., bool]:
    """The `jax.checkpoint` policy that saves every tensor whose action is not `remat`."""
    saved = {name for name, action in table.items() if action != 'remat'}

    def policy(primitive: Any, *_: Any, **params: Any) -> bool:
        if primitive.name == jaxprs.NAME:
            return params['name'] in saved
        return not saved.isdisjoint(jaxprs.KERNELS.get(primitive.name, ()))

    return policy


def _size(tree: Any) -> int:
    return len(jax.tree.leaves(tree))


def _leaves(
    jaxpr: Any, used: list[bool], first: int, place_of_x: int, size_of_x: int, input_name: str
) -> Iterator[Leaf]:
    """Describes the used leaves, which `jaxpr` returns from its output number `first` on."""
    behind_x = place_of_x + size_of_x
    arguments = {id(v): i for i, v in enumerate(jaxpr.invars)}
    constants = {id(v): i for i, v in enumerate(jaxpr.constvars)}
    seen: dict[int, int] = {}
    places = [first + i for i, is_used in enumerate(used) if is_used]
    for i, place in enumerate(places):
        variable = jaxprs.source(jaxpr.outvars[place], jaxpr)
        name, local = jaxprs.origin(variable, jaxpr)
        argument = arguments.get(id(variable), -1)
        if argument >= behind_x:
            argument -= size_of_x
        elif argument >= place_of_x:
            argument, name = -1, input_name
        twin = seen.setdefault(id(variable), i)
        yield Leaf(place, twin, argument, constants.get(id(variable), -1), name, local)
