"""Table from logical axes to mesh axes, and checks that a mesh divides what it must divide."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from helios_jax import config
from helios_jax.errors import require

Axes = tuple[str, ...]

MESH_AXES = ('slice', 'data', 'fsdp', 'expert', 'context', 'tensor')
RULES: Mapping[str, Axes] = {
    # activations
    'batch': ('slice', 'data', 'fsdp', 'expert'),
    'length': ('context',),
    'stored_length': ('context', 'tensor'),  # a saved activation's, if unsplit by tensor
    'stream': (),
    'streams': (),  # all of gmu.kind=hyper, side by side
    'choices': (),  # a token's experts
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


def shards(mesh: Any, name: str) -> int:
    """Number of pieces that a dimension of this logical name is cut into.

    Args:
      mesh: anything whose `shape` maps mesh axes to sizes.
    """
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
        pieces = shards(mesh, name)
        split = {axis: mesh.shape[axis] for axis in RULES[name]}
        require(
            size % pieces == 0,
            f'{label} {tuple(shape)}: dimension {name}={size} is not divisible by the mesh, which '
            f'cuts it into {pieces} pieces {split}; change the size or the mesh.',
        )


def fitting(shape: Sequence[int], axes: Axes, mesh: Any) -> Axes:
    """Replaces `stored_length` in `axes` by `length` where the mesh does not divide that size."""
    return tuple(
        'length' if name == 'stored_length' and size % shards(mesh, name) else name
        for size, name in zip(shape, axes, strict=True)
    )


def check_batch(cfg: config.Config, mesh: Any) -> None:
    """Refuses a batch whose rows or tokens the mesh or memory.backward_parts does not divide.

    Raises:
      UserError: naming the setting and what it must be a multiple of.
    """
    rows = cfg.train.batch_rows // cfg.train.microbatches
    label = f'batch of one microbatch (train.batch_rows={cfg.train.batch_rows})'
    check(label, (rows, cfg.data.row_length), ('batch', 'length'), mesh)
    halves = 2 * mesh.shape['context']
    require(
        halves == 2 or cfg.data.row_length % halves == 0,
        f'data.row_length={cfg.data.row_length} must be a multiple of {halves}, twice '
        'mesh.context: each device takes two blocks of a row.',
    )
    check_parts(cfg, mesh)


def check_parts(cfg: config.Config, mesh: Any) -> None:
    """Refuses a row or an MLP that memory.backward_parts does not divide on every device.

    Raises:
      UserError: naming the setting and what it must be a multiple of.
    """
    parts = cfg.memory.backward_parts
    dense = any(not kind.startswith('moe') for kind in cfg.model.kind_counts)
    for name, axis, size in (
        ('data.row_length', 'length', cfg.data.row_length),
        ('model.mlp_dim', 'mlp', cfg.model.mlp_dim if dense else 0),
    ):
        each = parts * shards(mesh, axis)
        require(
            parts == 1 or size % each == 0,
            f'{name}={size} must be a multiple of {each}: memory.backward_parts={parts} times the '
            f'{each // parts} devices that share it.',
        )


def sizes(mesh: config.Mesh, num_devices: int) -> list[int]:
    """The size of each of `MESH_AXES`, with -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = [getattr(mesh, axis) for axis in MESH_AXES]
    known = math.prod(size for size in shape if size != -1)
    named = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, shape, strict=True))
    require(
        num_devices % known == 0 and (-1 in shape or known == num_devices),
        f'mesh ({named}) does not fit {num_devices} devices: the sizes must multiply to '
        f'{num_devices}; set one axis, such as mesh.fsdp, to -1 to take what is left.',
    )
    return [num_devices // known if size == -1 else size for size in shape]
