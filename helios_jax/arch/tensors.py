"""Table of every named tensor, read from the rows of `config.Actions`.

The model names these tensors by `checkpoint_name`; memory/ stores them and plan/ counts them.
"""

import dataclasses
from typing import NamedTuple

from helios_jax.arch.rules import Axes
from helios_jax.config import Actions, Model


class Tensor(NamedTuple):
    name: str
    axes: Axes
    dtype: str  # a dtype that it must keep; '' is the compute dtype

    @property
    def exact(self) -> bool:
        """True if the tensor must not be rounded, because that would change the function."""
        return bool(self.dtype)


TENSORS = {
    field.name: Tensor(field.name, field.metadata['axes'], field.metadata['dtype'])
    for field in dataclasses.fields(Actions)
}
NAMES = tuple(TENSORS)


def shape(model: Model, name: str, rows: int, row_length: int) -> tuple[int, ...]:
    """Shape of a tensor on all devices, by its axes; around experts it depends on the mesh.

    Args:
      rows: B, the rows of one microbatch.
      row_length: T, tokens.
    """
    sizes = {
        'batch': rows,
        'length': row_length,
        'stored_length': row_length,
        'stream': model.embed_dim,
        'streams': model.streams_dim,
        'heads': model.num_heads,
        'kv_heads': model.num_kv_heads,
        'head_dim': model.head_dim,
        'mlp': model.mlp_dim,
        'gate': model.gate_width,
        'choices': model.moe.num_experts_per_token,
    }
    return tuple(sizes[axis] for axis in TENSORS[name].axes)
