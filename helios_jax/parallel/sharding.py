"""Shardings of all arrays: logical axes (arch/rules.py) turned into JAX's shardings."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from helios_jax.arch import rules
from helios_jax.arch.rules import RULES, Axes


def spec(axes: Sequence[str]) -> PartitionSpec:
    """Makes the PartitionSpec of an array whose dimensions have these logical names.

    Raises:
      ValueError: a name that the table lacks, or two names on one mesh axis.
    """
    used: dict[str, str] = {}
    placed: list[Axes | str | None] = []
    for name in axes:
        if name not in RULES:
            raise ValueError(f'logical axis {name!r} is not in the sharding table: {sorted(RULES)}')
        for mesh_axis in RULES[name]:
            if mesh_axis in used:
                raise ValueError(
                    f'logical axes {used[mesh_axis]!r} and {name!r} of {tuple(axes)} both map to '
                    f'mesh axis {mesh_axis!r}'
                )
            used[mesh_axis] = name
        rule = RULES[name]
        placed.append(None if not rule else rule[0] if len(rule) == 1 else rule)
    return PartitionSpec(*placed)


def sharding(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def logical_axes(boxed: Any) -> Any:
    """Returns the tree of logical axis tuples of boxed parameters, or of their shapes."""

    def names(leaf: Any) -> Axes:
        assert isinstance(leaf, nn.LogicallyPartitioned), f'parameter without logical axes: {leaf}'
        return tuple('layers' if n is None else n for n in leaf.names)

    return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def tree_shardings(mesh: Mesh | AbstractMesh, axes: Any, shapes: Any) -> Any:
    """Makes NamedShardings of a tree of arrays with logical axes `axes`, and checks sizes."""

    def one(path: Any, leaf: Any, names: Axes) -> NamedSharding:
        rules.check(jax.tree_util.keystr(path, simple=True, separator='/'), leaf.shape, names, mesh)
        return sharding(mesh, names)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains x to the sharding of its logical axes; does nothing without `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))


def fitting(shape: Sequence[int], axes: Axes) -> Axes:
    """Applies `rules.fitting` on the mesh that is set; returns `axes` without `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return axes if mesh.empty else rules.fitting(shape, axes, mesh)


def sharing(*axes: str) -> int:
    """Counts the devices that share an array of these logical axes; 1 without `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(rules.shards(mesh, name) for name in axes)


def rules_text() -> str:
    """Writes the rules as text, one logical axis a line."""
    return '\n'.join(f'{name:14} → {", ".join(rule) or "whole"}' for name, rule in RULES.items())
