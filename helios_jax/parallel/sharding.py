"""Logical axes → mesh axes: one table says where every dimension of every array lives."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from helios_jax.parallel.rules import BATCH_AXES, RULES, Axes, check, shards

__all__ = [
    'BATCH_AXES',
    'RULES',
    'Axes',
    'check',
    'constrain',
    'fitting',
    'logical_axes',
    'sharding',
    'shards',
    'spec',
    'table',
    'tree_shardings',
]


def spec(axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names.

    Raises:
      ValueError: a name that the table lacks, or two names on one mesh axis.
    """
    used: dict[str, str] = {}
    parts: list[Axes | str | None] = []
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
        parts.append(None if not rule else rule[0] if len(rule) == 1 else rule)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def logical_axes(boxed: Any) -> Any:
    """Tree of logical axis tuples of a tree of boxed parameters, or of their shapes."""

    def names(leaf: Any) -> Axes:
        assert isinstance(leaf, nn.LogicallyPartitioned), f'parameter without logical axes: {leaf}'
        return tuple('layers' if n is None else n for n in leaf.names)

    return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def tree_shardings(mesh: Mesh | AbstractMesh, axes: Any, shapes: Any) -> Any:
    """NamedShardings of a tree of arrays whose logical axes are `axes`, after checking sizes."""

    def one(path: Any, leaf: Any, names: Axes) -> NamedSharding:
        check(jax.tree_util.keystr(path, simple=True, separator='/'), leaf.shape, names, mesh)
        return sharding(mesh, names)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Keeps x where its logical axes say; does nothing where no mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))


def fitting(shape: Sequence[int], axes: Axes) -> Axes:
    """`axes`, with `length` for a `stored_length` that the mesh which is set does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    fits = lambda size, name: mesh.empty or size % shards(mesh, name) == 0  # noqa: E731
    return tuple(
        'length' if name == 'stored_length' and not fits(size, name) else name
        for size, name in zip(shape, axes, strict=True)
    )


def table() -> str:
    """The rules as text, one logical axis a line."""
    return '\n'.join(f'{name:14} → {", ".join(rule) or "whole"}' for name, rule in RULES.items())
