"""Makes a model that is ready to use out of a checkpoint directory."""

import concurrent.futures
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import PyTree

from helios_jax import checkpoint, config
from helios_jax.arch.rules import Axes
from helios_jax.arch.weights import read_in_compute_dtype
from helios_jax.data import tokenizer as tokenizers
from helios_jax.errors import UserError, one_of, require
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding

log = logging.getLogger(__name__)

VARIABLES = ('params', 'router')  # the items that a model reads
WEIGHTS = ('auto', 'ema', 'trained')  # whose item is 'ema', if there is one, or 'params'


class Restored(NamedTuple):
    model: Transformer
    variables: PyTree  # variables for model.apply: 'params', and 'router' for experts
    tokenizer: tokenizers.Tokenizer
    config: config.Config


def checkpoint_directory(directory: epath.PathLike) -> epath.Path:
    """Finds the checkpoints below a run's workdir; returns `directory` if it holds them itself."""
    path = epath.Path(directory).expanduser()
    return path / 'checkpoints' if (path / 'checkpoints').exists() else path


def restore(
    directory: epath.PathLike,
    step: int | str = 'latest',
    *,
    weights: str = 'auto',
    mesh: jax.sharding.Mesh | None = None,
    rope: dict[str, Any] | None = None,
    meanwhile: Callable[[Restored], object] | None = None,
) -> Restored:
    """Reads a checkpoint onto this machine's devices, whatever mesh wrote it.

    Only the files of the variables, the metadata and the tokenizer are read, each hashed.
    Parameters are float32. Where bfloat16 was exported they are what a train step's copy is:
    bfloat16 if the model reads them in no other dtype, else widened to float32.

    Args:
      directory: a run's workdir, or its `checkpoints`; local or gs://.
      step: latest, best, or a number.
      weights: trained (those of the last update), ema (their running average, see `train.ema`), or
        auto: the average where the checkpoint has one, which is logged.
      mesh: where the parameters go; all devices by default (`default_mesh`). Call the model under
        `jax.set_mesh` of it if it has several.
      rope: settings to replace, such as {'scaling': 'dynamic'} to read past the trained length.
      meanwhile: what to do while the arrays are read, such as to compile what will take them: it
        is given `jax.ShapeDtypeStruct`s in their place.
    Raises:
      UserError: no checkpoint there, no such step, damaged files, a config that this version
        refuses, a tokenizer that is not the checkpoint's, or no average where it is asked for.
    """
    directory = checkpoint_directory(directory)
    opened = checkpoint.open_step(directory, step)
    try:
        return _restored(opened, weights, mesh, rope or {}, meanwhile)
    except checkpoint.DamageError:
        if step not in ('latest', 'best'):
            raise
    # Hashed now before it is chosen: those that are damaged are named, and passed over.
    items = VARIABLES if weights == 'trained' else (*VARIABLES, 'ema')
    opened = checkpoint.open_step(directory, step, items)
    return _restored(opened, weights, mesh, rope or {}, meanwhile)


def _restored(
    opened: checkpoint.Opened,
    weights: str,
    mesh: jax.sharding.Mesh | None,
    rope: dict[str, Any],
    meanwhile: Callable[[Restored], object] | None,
) -> Restored:
    item = weights_item(opened, weights)
    cfg = saved_config(opened)
    changes = {f'model.rope.{name}': value for name, value in rope.items()}
    if cfg.model.attention != 'reference':
        changes['model.attention'] = 'auto'  # the run named what its own machine has
    cfg = config.replace(cfg, changes)
    made = Restored(Transformer(cfg.model), None, load_tokenizer(opened), cfg)
    if weights == 'auto' and item == 'ema':
        log.info('Reading the average of the weights (ema); weights=trained reads the last ones.')
    shapes = abstract_arrays(made.model, mesh, narrow=is_bfloat16(opened, item))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_arrays, opened, shapes, item)
        if meanwhile:
            meanwhile(made._replace(variables=shapes))
        return made._replace(variables=reading.result())


def weights_item(opened: checkpoint.Opened, weights: str) -> str:
    """Names the item that holds the weights which are asked for, one of `WEIGHTS`.

    Raises:
      UserError: no such choice; the average is asked for, and the checkpoint has none.
    """
    one_of('weights', weights, WEIGHTS)
    has_average = 'ema' in opened.items
    require(
        has_average or weights != 'ema',
        f'weights=ema, but checkpoint {opened.folder} has no average of its weights (train.ema was '
        'off); leave it out, or write trained.',
    )
    return 'ema' if has_average and weights != 'trained' else 'params'


def is_bfloat16(opened: checkpoint.Opened, item: str) -> bool:
    """True if an item's arrays are bfloat16, as `helios ckpt export` writes parameters."""
    arrays = opened.metadata['arrays'].get(item, {}).values()
    return bool(arrays) and all(shape.startswith('bfloat16[') for shape in arrays)


def read_metadata(directory: epath.PathLike, step: int | str = 'latest') -> dict[str, Any]:
    """Reads the metadata of a step: config, data, samples, metrics."""
    return checkpoint.open_step(checkpoint_directory(directory), step).metadata


def read_tokenizer(directory: epath.PathLike, step: int | str = 'latest') -> tokenizers.Tokenizer:
    """Loads a checkpoint's tokenizer, and no array.

    Raises:
      UserError: as `load_tokenizer`; no checkpoint there, or no such step.
    """
    return load_tokenizer(checkpoint.open_step(checkpoint_directory(directory), step))


def saved_config(opened: checkpoint.Opened) -> config.Config:
    """Reads the resolved config that a checkpoint was trained with.

    Raises:
      UserError: it has none, or one that this version refuses.
    """
    values = opened.metadata.get('config')
    try:
        return config.from_dict(with_earlier_defaults(values))
    except UserError as error:
        raise UserError(
            f'the config in checkpoint {opened.folder} cannot be used: {error}'
        ) from error


def with_earlier_defaults(values: Any) -> Any:
    """Fills in a setting that came after a config was saved by what held before it came."""
    match values:
        case {'model': {'gmu': {**saved}}} if 'gate_input' not in saved:
            gmu = saved | {'gate_input': 'both'}
            return values | {'model': values['model'] | {'gmu': gmu}}
    return values


def load_tokenizer(opened: checkpoint.Opened) -> tokenizers.Tokenizer:
    """Loads the tokenizer that travels with the checkpoints.

    Raises:
      UserError: its file is absent or is not the one that the checkpoint was saved with.
    """
    spec, hashes = opened.metadata.get('tokenizer'), opened.metadata.get('tokenizer_files', {})
    if not isinstance(spec, str) or epath.Path(spec).name != spec or not isinstance(hashes, dict):
        raise UserError(
            f'checkpoint {opened.folder} names no tokenizer in its metadata, but {spec!r:.80}; '
            'restore another step (see `helios ckpt ls`).'
        )
    damage = opened.tokenizer_damage()
    require(not damage, f'{damage}.')
    tokenizer = tokenizers.load(spec, checkpoint.tokenizer_directory(opened.directory))
    model = saved_config(opened).model
    expected = model.vocab_size - model.spare_vocab
    require(
        tokenizer.vocab_size == expected,
        f'tokenizer {spec} has {tokenizer.vocab_size} tokens, but the checkpoint in '
        f'{opened.directory} was trained with {expected}; put back the tokenizer that was saved '
        'with it.',
    )
    return tokenizer


def abstract_arrays(
    model: Transformer, mesh: jax.sharding.Mesh | None = None, *, narrow: bool = False
) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and shardings of the model's variables over `mesh`.

    Args:
      narrow: parameters that the model reads in the compute dtype alone are in that dtype.
    """
    boxed = abstract_variables(model)
    shapes, axes = nn.unbox(boxed), sharding.logical_axes(boxed)
    mesh = default_mesh(axes, shapes) if mesh is None else mesh
    shardings = sharding.tree_shardings(mesh, axes, shapes)
    compute = jnp.dtype(model.model.compute_dtype)

    def place(x: Any, axes: Axes, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        dtype = compute if narrow and read_in_compute_dtype(axes) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=where)

    return jax.tree.map(place, shapes, axes, shardings)


def read_arrays(
    opened: checkpoint.Opened, abstract: PyTree[jax.ShapeDtypeStruct], params: str = 'params'
) -> PyTree:
    """The items of one step that are collections of variables, where `abstract` has them.

    Args:
      params: the item that the parameters are read from.
    """
    items = {'params': params}
    return {name: opened.restore(items.get(name, name), tree) for name, tree in abstract.items()}


def default_mesh(axes: PyTree, shapes: PyTree) -> jax.sharding.Mesh:
    """Makes a mesh of all devices: weights are split where the sizes allow, else copied to each."""
    split = meshes.make(config.Mesh())
    try:
        sharding.tree_shardings(split, axes, shapes)
    except UserError as error:
        log.info('Every device holds a copy of the weights: %s', error)
        return meshes.make(config.Mesh(data=-1, fsdp=1))
    return split


def mesh_of(variables: PyTree) -> jax.sharding.Mesh:
    """Returns the mesh that restored variables live on."""
    return jax.tree.leaves(variables)[0].sharding.mesh
