"""Everything that the memory system knows of JAX and that JAX does not promise to keep.

Names of primitives, the parameters of their equations, and how a jaxpr nests: tests/memory/
jaxprs_test.py holds each to a function that is traced there, so that a release of JAX which renames
one fails by that name, and setup.cfg bounds the releases.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr

NAME = 'name'  # what `checkpoint_name` leaves behind
SCAN = 'scan'
SHARD_MAP = 'shard_map'
CONSTRAINT = 'sharding_constraint'
# A kernel that is one primitive names nothing; these are the names of its results.
KERNELS = {'dot_product_attention_fwd_wrapper': ('attention_output', 'log_sum_exp')}
# Identities that JAX itself inserts between a name and what differentiation saves.
TRANSPARENT = ('reduce_precision', 'reshape', 'broadcast_in_dim', 'squeeze')
# What runs an inner jaxpr once, on its own arguments.
CALLS = ('jit', 'pjit', 'checkpoint', 'remat2')


def primitive(equation: Any) -> str:
    return equation.primitive.name


def given_name(equation: Any) -> str:
    """The name that a `checkpoint_name` gives; '' if the equation is something else."""
    return equation.params['name'] if primitive(equation) == NAME else ''


def scan_length(equation: Any) -> int:
    """Number of steps of a scan; 0 if the equation is something else."""
    return equation.params['length'] if primitive(equation) == SCAN else 0


def constraint(equation: Any) -> jax.sharding.Sharding | None:
    """The sharding that the equation constrains its operand to; None if it is something else."""
    return equation.params['sharding'] if primitive(equation) == CONSTRAINT else None


def made_by(jaxpr: Any) -> dict[int, tuple[Any, int]]:
    """id of a variable → the equation that computes it, and its place among the results."""
    return {id(v): (e, place) for e in jaxpr.eqns for place, v in enumerate(e.outvars)}


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    is_jaxpr = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    return [getattr(x, 'jaxpr', x) for x in leaves if is_jaxpr(x)]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, closed or not, and of the jaxprs inside it."""
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)


def without_dead_code(
    closed: jex.ClosedJaxpr, removable: Sequence[bool]
) -> tuple[jex.ClosedJaxpr, list[bool]]:
    """The same function of the arguments that it reads, and which of them those are.

    Args:
      removable: for each argument, False keeps it even where nothing reads it.
    """
    keeps = [not is_removable for is_removable in removable]
    live, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), keeps)
    return jex.ClosedJaxpr(live, closed.consts), used


def source(variable: Any, jaxpr: Any) -> Any:
    """Follows a variable back through calls that return an input unchanged."""
    makers = made_by(jaxpr)
    while id(variable) in makers:
        equation, place = makers[id(variable)]
        if primitive(equation) not in CALLS:
            break
        (inner,) = inner_jaxprs(equation)
        returned = source(inner.outvars[place], inner)
        handed_on = [i for i, v in enumerate(inner.invars) if v is returned]
        if not handed_on:
            break
        variable = equation.invars[handed_on[0]]
    return variable


def origin(variable: Any, jaxpr: Any) -> tuple[str, tuple[int, ...] | None]:
    """Returns the name of a variable of `jaxpr`, or '', and its shape in a shard_map, if any."""
    equation, place = made_by(jaxpr).get(id(variable), (None, 0))
    if equation is None:
        return '', None
    if name := given_name(equation):
        return name, None
    if primitive(equation) in KERNELS:
        return KERNELS[primitive(equation)][place], None
    if primitive(equation) in TRANSPARENT:
        return origin(equation.invars[0], jaxpr)
    for inner in inner_jaxprs(equation):
        if len(inner.outvars) == len(equation.outvars):
            name, local = origin(source(inner.outvars[place], inner), inner)
            if name and primitive(equation) == SHARD_MAP:
                return name, tuple(inner.outvars[place].aval.shape)
            if name:
                return name, local
    return '', None
