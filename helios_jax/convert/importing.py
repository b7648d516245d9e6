"""Reads a Hugging Face directory onto a mesh, tensor by tensor.

The next tensor comes from the disk, and programs that turn tensors are compiled, in threads beside
the one that places them.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from helios_jax import config
from helios_jax.convert import families, names, tokenizers
from helios_jax.convert.names import Counterpart
from helios_jax.convert.tensors import DTYPES, Tensors
from helios_jax.convert.values import read_json
from helios_jax.errors import require
from helios_jax.model.transformer import Transformer
from helios_jax.restoring import Restored, abstract_arrays

CONFIG = 'config.json'
# What travels back, though no config of ours has it.
KEPT = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'max_position_embeddings')
# An unembedding that a tied checkpoint may carry as well.
HEAD, EMBEDDING = (names.TOP[name] for name in ('unembedding.w', 'embed.w'))
T, R = TypeVar('T'), TypeVar('R')


class CheckedDirectory(NamedTuple):
    """A directory whose every header has been checked; no weight has been read."""

    family: str
    model: config.Model  # what the directory holds
    config: config.Config  # of a run that goes on from what becomes of it
    tensors: Tensors
    pieces: list[Counterpart]
    files: tokenizers.Files
    values: dict[str, Any]  # config.json


def open_directory(
    directory: epath.PathLike, *, to_gmu: bool = False, upcycle: tuple[int, int] | None = None
) -> CheckedDirectory:
    """Checks a directory of safetensors, config.json and a tokenizer.

    Args:
      to_gmu: re-express the residual network as a convex GMU that starts with the same logits.
      upcycle: experts of each layer, and of a token: a dense model becomes a mixture of copies.
    Raises:
      UserError: anything there that cannot be used, by name.
    """
    directory = epath.Path(directory).expanduser()
    require(directory.is_dir(), f'--from={directory}: no such directory.')
    values = read_json(directory / CONFIG)
    family, model = families.read(values)
    target = families.upcycled(model, *upcycle) if upcycle else model
    cfg = _config(families.gated(target) if to_gmu else target)
    tensors = Tensors(directory)
    # Numbers that lie are refused before anything is listed layer by layer, expert by expert.
    E = model.moe.num_experts
    least = sum(E if kind.startswith('moe') else 1 for kind in model.layer_kinds)
    require(
        least <= len(tensors.found),
        f'{directory} has {len(tensors.found)} tensors, too few for the {model.num_layers} layers '
        f'{f"and {E} experts " if E else ""}of its config.json.',
    )
    wanted = {piece.name: piece.shape for piece in names.pieces(model, family)}
    if model.tied_embeddings and HEAD in tensors.found:
        wanted[HEAD] = wanted[EMBEDDING]
    tensors.require_exactly(wanted)
    files = tokenizers.read(directory, model.vocab_size, values)
    spare = model.vocab_size - files.tokenizer.vocab_size
    cfg = config.replace(cfg, {'model.spare_vocab': spare})
    pieces = names.pieces(cfg.model, family, upcycled=bool(upcycle))
    return CheckedDirectory(family, model, cfg, tensors, pieces, files, values)


def load(
    source: CheckedDirectory, *, mesh: jax.sharding.Mesh | None = None, seed: int = 0
) -> Restored:
    """Reads the weights straight onto a mesh, float32; the host holds two tensors at a time.

    Args:
      mesh: all devices by default, as `restoring.restore`.
      seed: draws what the directory has no weights for: gates' first matrices, upcycled routers.
    Raises:
      UserError: weights that are not finite; a tied checkpoint whose unembedding differs from its
        embedding.
    """
    check_head(source)
    flat = shapes(source, mesh)
    with ThreadPoolExecutor() as pool:
        programs = {
            form: pool.submit(compiled, flat[piece.weight.name], *form)
            for form, piece in {placing(source, piece): piece for piece in source.pieces}.items()
        }
        arrays = fresh(source, flat, seed)
        arrays |= zeros({name: shape for name, shape in flat.items() if name not in arrays})
        places: dict[str, list[Counterpart]] = {}
        for piece in source.pieces:
            places.setdefault(piece.name, []).append(piece)
        for name, tensor in ahead(pool, source.tensors.read, places):
            for piece in places[name]:
                key, place = piece.weight.name, programs[placing(source, piece)].result()
                # Waiting bounds the copies that are on their way to a device.
                arrays[key] = jax.block_until_ready(place(arrays[key], tensor, starts(piece)))
            del tensor  # the next but one is read from here on
    model = Transformer(source.config.model)
    return Restored(model, _variables(arrays), source.files.tokenizer, source.config)


def shapes(
    source: CheckedDirectory, mesh: jax.sharding.Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of all arrays by their names; balance biases are behind `ROUTER`."""
    abstract = abstract_arrays(Transformer(source.config.model), mesh)
    biases = flatten_dict(abstract.get('router', {}), sep='.')
    flat: dict[str, jax.ShapeDtypeStruct] = flatten_dict(abstract['params'], sep='.')
    return flat | {f'{names.ROUTER}{name}': shape for name, shape in biases.items()}


def fresh(
    source: CheckedDirectory, flat: dict[str, jax.ShapeDtypeStruct], seed: int
) -> dict[str, Array]:
    """Makes the parameters that the directory has no weights for."""
    filled = {piece.weight.name for piece in source.pieces}
    wanted = {
        name: shape
        for name, shape in flat.items()
        if name not in filled and not name.startswith(names.ROUTER)
    }
    return initial(Transformer(source.config.model), wanted, seed)


def origin(source: CheckedDirectory) -> dict[str, Any]:
    """Says where a model comes from, for the metadata of its checkpoint."""
    return {
        'format': 'huggingface',
        'family': source.family,
        'config': {name: source.values[name] for name in KEPT if name in source.values},
    }


def initial(
    model: Transformer, wanted: dict[str, jax.ShapeDtypeStruct], seed: int
) -> dict[str, Array]:
    """Makes some parameters as a fresh model has them, where their shapes say."""
    if not wanted:
        return {}

    def made() -> dict[str, Array]:
        tokens = jnp.zeros((1, 2), jnp.int32)
        params: Any = nn.unbox(model.init(jax.random.key(seed), tokens, tokens))['params']
        flat = flatten_dict(params, sep='.')
        return {name: flat[name] for name in wanted}

    return jax.jit(made, out_shardings={n: shape.sharding for n, shape in wanted.items()})()


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yields each item with what a function returns for it, which runs for the next one already."""
    running: tuple[T, Future[R]] | None = None
    for item in items:
        following = item, pool.submit(function, item)
        if running:
            yield running[0], running[1].result()
        running = following
    if running:
        yield running[0], running[1].result()


class Placing(NamedTuple):
    """Properties that tensors share which one program places."""

    piece: Counterpart  # without its name and its place
    dtype: str


def placing(source: CheckedDirectory, piece: Counterpart) -> Placing:
    alike = piece._replace(name='', place=(0,) * len(piece.place))
    return Placing(alike, source.tensors.found[piece.name].dtype)


def starts(piece: Counterpart) -> tuple[np.int32, ...]:
    """Says where in our array the tensor begins."""
    whole = len(piece.weight.shape) - len(piece.place)
    return (*map(np.int32, piece.place), *[np.int32(0)] * whole)


def compiled(shape: jax.ShapeDtypeStruct, piece: Counterpart, dtype: str) -> Any:
    """Compiles what writes a tensor of theirs into an array that the caller gives up."""

    def update(array: Array, tensor: Array, starts: tuple[Array, ...]) -> Array:
        value = piece.to_ours(tensor).astype(array.dtype)
        value = value.reshape((1,) * len(piece.place) + value.shape)
        return jax.lax.dynamic_update_slice(array, value, starts)

    tensor = jax.ShapeDtypeStruct(piece.shape, DTYPES[dtype])
    jitted = jax.jit(update, donate_argnums=0, out_shardings=shape.sharding)
    return jitted.lower(shape, tensor, starts(piece)).compile()


def zeros(wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Makes arrays where their shapes say, all in one program."""
    make = lambda: {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in wanted.items()}
    return jax.jit(make, out_shardings={n: shape.sharding for n, shape in wanted.items()})()


def _variables(arrays: dict[str, Array]) -> PyTree:
    groups: dict[str, dict[str, Array]] = {'params': {}}
    for name, array in arrays.items():
        if name.startswith(names.ROUTER):
            groups.setdefault('router', {})[name.removeprefix(names.ROUTER)] = array
        else:
            groups['params'][name] = array
    return {group: unflatten_dict(flat, sep='.') for group, flat in groups.items()}


def check_head(source: CheckedDirectory) -> None:
    """Refuses a tied checkpoint that has another unembedding than its embedding."""
    if not source.model.tied_embeddings or HEAD not in source.tensors.found:
        return
    require(
        np.array_equal(source.tensors.read(HEAD), source.tensors.read(EMBEDDING)),
        f'{source.tensors.directory}: config.json says tie_word_embeddings, but {HEAD} differs '
        f'from {EMBEDDING}; set it to false.',
    )


def _config(model: config.Model) -> config.Config:
    usual = config.Config()
    row_length = min(usual.data.row_length, max(4, model.rope.trained_length))
    return config.replace(usual, {'model': model, 'data.row_length': row_length})
