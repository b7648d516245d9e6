"""A function taken apart for differentiation: what its backward pass reads, each under its name.

`jax.vjp` of a `jax.checkpoint`ed function is a pytree whose leaves are the tensors that the policy
saves and the function's own arguments. The leaves have no names, so the function is traced once and
each leaf followed back through the jaxpr: to an argument, or to the `checkpoint_name` (or the
kernel) that made it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from helios_jax.memory import policy

# What may lie between a name and the leaf: identities that jax itself inserts.
TRANSPARENT = ('reduce_precision', 'reshape', 'broadcast_in_dim', 'squeeze')


class Leaf(NamedTuple):
    """Where one leaf of a vjp comes from."""

    twin: int  # the first leaf that is the same array: its own index if there is none before
    argument: int  # which of the flat arguments other than x, −1 if it is none
    constant: int  # which of the jaxpr's constants, −1 if it is none
    name: str  # of the tensor, '' if it has none
    manual: bool  # made inside a shard_map: its first axis is all devices', one after another


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """function(params, x, *others), differentiable in params and x, ready to run forward."""

    jaxpr: jex.ClosedJaxpr
    out_tree: Any
    vjp_tree: Any
    leaves: tuple[Leaf, ...]

    def forward(self, *arguments: Any) -> tuple[Any, list[jax.Array]]:
        """(the function's value, the leaves of its vjp)."""
        values = jex.jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(arguments))
        outputs = self.out_tree.num_leaves
        return jax.tree.unflatten(self.out_tree, values[:outputs]), values[outputs:]

    def dtype(self, i: int) -> Any:
        """Of leaf i."""
        return self.jaxpr.out_avals[self.out_tree.num_leaves + i].dtype

    def backward(self, leaves: list[jax.Array], cotangents: Any) -> Any:
        """Gradients of params and x."""
        return jax.tree.unflatten(self.vjp_tree, leaves)(cotangents)


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
    """
    saves = policy.checkpoint_policy(table)
    checkpointed = jax.checkpoint(function, policy=saves, prevent_cse=False)

    def run(params: Any, x: Any, *others: Any) -> Any:
        return jax.vjp(lambda params, x: checkpointed(params, x, *others), params, x)

    closed, (out, vjp) = jax.make_jaxpr(run, return_shape=True)(params, x, *others)
    jaxpr = closed.jaxpr
    out_tree: Any = jax.tree.structure(out)
    vjp_tree: Any = jax.tree.structure(vjp)
    arguments = {id(v): i for i, v in enumerate(jaxpr.invars)}
    constants = {id(v): i for i, v in enumerate(jaxpr.constvars)}
    place_of_x = len(jax.tree.leaves(params))
    first: dict[int, int] = {}
    leaves = []
    for i, v in enumerate(jaxpr.outvars[out_tree.num_leaves :]):
        name, manual = origin(v, jaxpr)
        argument = arguments.get(id(v), -1)
        if argument == place_of_x:
            argument, name = -1, input_name
        twin = first.setdefault(id(v), i)
        leaves.append(Leaf(twin, argument, constants.get(id(v), -1), name, manual))
    return Linearized(closed, out_tree, vjp_tree, tuple(leaves))


def origin(variable: Any, jaxpr: Any) -> tuple[str, bool]:
    """(the name under which `jaxpr` made the variable or '', whether inside a shard_map)."""
    for equation in reversed(jaxpr.eqns):
        place = next((i for i, v in enumerate(equation.outvars) if v is variable), None)
        if place is None:
            continue
        primitive = equation.primitive.name
        if primitive == 'name':
            return equation.params['name'], False
        if primitive in policy.PRIMITIVES:
            return policy.PRIMITIVES[primitive][place], False
        if primitive in TRANSPARENT:
            return origin(equation.invars[0], jaxpr)
        for inner in inner_jaxprs(equation):
            if len(inner.outvars) == len(equation.outvars):
                name, manual = origin(inner.outvars[place], inner)
                if name:
                    return name, manual or primitive == 'shard_map'
        break
    return '', False


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    is_jaxpr = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')  # noqa: E731
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [getattr(x, 'jaxpr', x) for x in leaves if is_jaxpr(x)]
