"""Where every array lives: logical axes (arch/rules.py) as JAX's shardings."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from helios_jax.arch import rules
from helios_jax.arch.rules import RULES, Axes


def spec(axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names.

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
    """Tree of logical axis tuples of a tree of boxed parameters, or of their shapes."""

    def names(leaf: Any) -> Axes:
        assert isinstance(leaf, nn.LogicallyPartitioned), f'parameter without logical axes: {leaf}'
        return tuple('layers' if n is None else n for n in leaf.names)

    return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def tree_shardings(mesh: Mesh | AbstractMesh, axes: Any, shapes: Any) -> Any:
    """NamedShardings of a tree of arrays whose logical axes are `axes`, after checking sizes."""

    def one(path: Any, leaf: Any, names: Axes) -> NamedSharding:
        rules.check(jax.tree_util.keystr(path, simple=True, separator='/'), leaf.shape, names, mesh)
        return sharding(mesh, names)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Keeps x where its logical axes say; does nothing where no mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))


def fitting(shape: Sequence[int], axes: Axes) -> Axes:
    """`rules.fitting` on the mesh that is set (`jax.set_mesh`); `axes` where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    return axes if mesh.empty else rules.fitting(shape, axes, mesh)


def rules_text() -> str:
    """The rules as text, one logical axis a line."""
    return '\n'.join(f'{name:14} → {", ".join(rule) or "whole"}' for name, rule in RULES.items())
