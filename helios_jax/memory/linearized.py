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
from jax.interpreters.partial_eval import dce_jaxpr

from helios_jax.memory import policy

# What may lie between a name and the leaf: identities that jax itself inserts.
TRANSPARENT = ('reduce_precision', 'reshape', 'broadcast_in_dim', 'squeeze')
# What runs an inner jaxpr once, on its own arguments.
CALLS = ('jit', 'pjit', 'checkpoint', 'remat2')


class Leaf(NamedTuple):
    """Where one leaf of a vjp comes from."""

    place: int  # among the forward jaxpr's outputs
    twin: int  # the first leaf that is the same array: its own index if there is none before
    argument: int  # which of the flat arguments other than x, −1 if it is none
    constant: int  # which of the jaxpr's constants, −1 if it is none
    name: str  # of the tensor, '' if it has none
    manual: bool  # made inside a shard_map: its first axis is all devices', one after another


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """function(params, x, *others), differentiable in params and x, ready to run forward."""

    jaxpr: jex.ClosedJaxpr  # arguments → the function's value, the leaves
    out_tree: Any
    leaves: tuple[Leaf, ...]  # those that the backward pass reads
    transposed: jex.ClosedJaxpr  # these leaves, cotangents of the value → gradients
    gradient_tree: Any

    def forward(self, *arguments: Any) -> tuple[Any, list[Any]]:
        """(the function's value, the leaves of its vjp)."""
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
    """
    saves = policy.checkpoint_policy(table)
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
    # The cotangents stay, read or not.
    live, used = dce_jaxpr(
        back.jaxpr, [True] * len(back.out_avals), [False] * num_leaves + [True] * _size(out)
    )
    return Linearized(
        closed,
        jax.tree.structure(out),
        tuple(_leaves(closed.jaxpr, used[:num_leaves], _size(out), _size(params), input_name)),
        jex.ClosedJaxpr(live, back.consts),
        jax.tree.structure(gradients),
    )


def _size(tree: Any) -> int:
    return len(jax.tree.leaves(tree))


def _leaves(
    jaxpr: Any, used: list[bool], first: int, place_of_x: int, input_name: str
) -> Iterator[Leaf]:
    """Describes the used leaves, which `jaxpr` returns from its output number `first` on."""
    arguments = {id(v): i for i, v in enumerate(jaxpr.invars)}
    constants = {id(v): i for i, v in enumerate(jaxpr.constvars)}
    seen: dict[int, int] = {}
    places = [first + i for i, is_used in enumerate(used) if is_used]
    for i, place in enumerate(places):
        variable = source(jaxpr.outvars[place], jaxpr)
        name, manual = origin(variable, jaxpr)
        argument = arguments.get(id(variable), -1)
        if argument == place_of_x:
            argument, name = -1, input_name
        twin = seen.setdefault(id(variable), i)
        yield Leaf(place, twin, argument, constants.get(id(variable), -1), name, manual)


def source(variable: Any, jaxpr: Any) -> Any:
    """Follows a variable back through calls that return an input unchanged."""
    made_by = {id(v): (e, place) for e in jaxpr.eqns for place, v in enumerate(e.outvars)}
    while id(variable) in made_by:
        equation, place = made_by[id(variable)]
        if equation.primitive.name not in CALLS:
            break
        (inner,) = inner_jaxprs(equation)
        returned = source(inner.outvars[place], inner)
        handed_on = [i for i, v in enumerate(inner.invars) if v is returned]
        if not handed_on:
            break
        variable = equation.invars[handed_on[0]]
    return variable


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
                name, manual = origin(source(inner.outvars[place], inner), inner)
                if name:
                    return name, manual or primitive == 'shard_map'
        break
    return '', False


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    is_jaxpr = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')  # noqa: E731
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [getattr(x, 'jaxpr', x) for x in leaves if is_jaxpr(x)]
