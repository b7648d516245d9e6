"""From a checkpoint directory to a model that is ready to use."""

import logging
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from etils import epath
from jaxtyping import PyTree

from helios_jax import checkpoint, config
from helios_jax.data import tokenizer as tokenizers
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    model: Transformer
    variables: PyTree  # for model.apply: 'params', and 'router' of a mixture of experts
    tokenizer: tokenizers.Tokenizer
    config: config.Config


def checkpoint_directory(directory: epath.PathLike) -> epath.Path:
    """The checkpoints below a run's workdir, or `directory` where it is theirs already."""
    path = epath.Path(directory).expanduser()
    return path / 'checkpoints' if (path / 'checkpoints').exists() else path


def restore(
    directory: epath.PathLike,
    step: int | str = 'latest',
    *,
    mesh: jax.sharding.Mesh | None = None,
    rope: dict[str, Any] | None = None,
) -> Restored:
    """Reads a checkpoint onto this machine's devices, whatever mesh wrote it.

    Args:
      directory: a run's workdir, or its `checkpoints`; local or gs://.
      step: latest, best, or a number.
      mesh: where the parameters go; all devices by default (`default_mesh`). Call the model under
        `jax.set_mesh` of it if it has several.
      rope: settings to replace, such as {'scaling': 'dynamic'} to read past the trained length.
    Raises:
      UserError: no checkpoint there, no such step, damaged files, or a tokenizer whose vocabulary
        is not the checkpoint's.
    """
    directory = checkpoint_directory(directory)
    step = checkpoint.resolve(directory, step)
    metadata = checkpoint.read_metadata(directory, step)
    cfg = config.from_dict(metadata['config'])
    if rope:
        cfg = config.replace(cfg, {f'model.rope.{name}': value for name, value in rope.items()})
    tokenizer = load_tokenizer(directory, metadata)
    model = Transformer(cfg.model)
    return Restored(model, restore_variables(model, directory, step, mesh), tokenizer, cfg)


def load_tokenizer(directory: epath.Path, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that travels with the checkpoints."""
    spec = metadata['tokenizer']
    tokenizer = tokenizers.load(spec, checkpoint.tokenizer_directory(directory))
    expected = metadata['config']['model']['vocab_size']
    config.require(
        tokenizer.vocab_size == expected,
        f'tokenizer {spec} has {tokenizer.vocab_size} tokens, but the checkpoint in {directory} '
        f'was trained with {expected}; put back the tokenizer that was saved with it.',
    )
    return tokenizer


def restore_variables(
    model: Transformer,
    directory: epath.Path,
    step: int,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> PyTree:
    """The model's variables from one step, sharded over `mesh`."""
    boxed = abstract_variables(model)
    shapes, axes = nn.unbox(boxed), sharding.logical_axes(boxed)
    mesh = default_mesh(axes, shapes) if mesh is None else mesh
    shardings = sharding.tree_shardings(mesh, axes, shapes)
    abstract = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )
    return {
        collection: checkpoint.restore(directory, step, collection, tree)
        for collection, tree in abstract.items()
    }


def default_mesh(axes: PyTree, shapes: PyTree) -> jax.sharding.Mesh:
    """All devices, the weights split over them where the sizes allow, else a copy on each."""
    split = meshes.make(config.Mesh())
    try:
        sharding.tree_shardings(split, axes, shapes)
    except config.UserError as error:
        log.info('Every device holds a copy of the weights: %s', error)
        return meshes.make(config.Mesh(data=-1, fsdp=1))
    return split


def mesh_of(variables: PyTree) -> jax.sharding.Mesh:
    """The mesh that restored variables live on."""
    return jax.tree.leaves(variables)[0].sharding.mesh
