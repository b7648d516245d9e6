"""Logical axes → mesh axes: one table says where every dimension of every array lives."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from helios_jax import config

Axes = tuple[str, ...]

RULES: Mapping[str, Axes] = {
    # activations
    'batch': ('slice', 'data', 'fsdp', 'expert'),
    'length': ('context',),
    'stored_length': ('context', 'tensor'),  # of a saved activation that tensor does not split
    'stream': (),
    'loss_batch': ('slice', 'data', 'expert'),  # beside unembed_vocab, which takes fsdp
    'whole': (),
    # parameters; heads, kv_heads and mlp name activations as well
    'layers': (),
    'embed': ('fsdp',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'head_dim': (),
    'mlp': ('tensor',),
    'experts': ('expert',),
    'vocab': ('tensor',),
    'unembed_vocab': ('fsdp', 'tensor'),  # gathering tokens moves less than gathering the head
    'gate': (),
    'gate_embed': ('fsdp',),
    'norm': (),
}
BATCH_AXES = RULES['batch']


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


def shards(mesh: Any, name: str) -> int:
    """Number of parts that a dimension of this logical name is cut into."""
    size = 1
    for mesh_axis in RULES[name]:
        size *= mesh.shape[mesh_axis]
    return size


def check(label: str, shape: Sequence[int], axes: Sequence[str], mesh: Any) -> None:
    """Refuses a shape that the mesh does not divide.

    Raises:
      UserError: naming `label`, the dimension and the mesh axes.
    """
    assert len(shape) == len(axes), f'{label}: shape {shape} has other dimensions than {axes}'
    for size, name in zip(shape, axes, strict=True):
        parts = shards(mesh, name)
        split = {axis: mesh.shape[axis] for axis in RULES[name]}
        config.require(
            size % parts == 0,
            f'{label} {tuple(shape)}: dimension {name}={size} is not divisible by the mesh, which '
            f'cuts it into {parts} parts {split}; change the size or the mesh.',
        )


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
