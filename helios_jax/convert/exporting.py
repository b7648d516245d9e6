"""Writes a model as a Hugging Face directory: a known family's layout, or with a model of our own.

A model with gates, or with anything else that transformers' own families lack, goes with
modeling_helios.py, which transformers runs if it is told `trust_remote_code=True`.
"""

import dataclasses
import json
import math
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from helios_jax import checkpoint, config, restoring
from helios_jax.convert import families, names, rope, tensors, tokenizers
from helios_jax.convert.importing import CONFIG, KEPT
from helios_jax.errors import require

MODELING = 'modeling_helios.py'
DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


def export(
    checkpoint_directory: epath.PathLike,
    to: epath.PathLike,
    *,
    step: int | str = 'latest',
    dtype: str = 'float32',
    shard_bytes: int = 5 * 10**9,
) -> str:
    """Writes a checkpoint's parameters, config and tokenizer; returns the name of the family.

    Args:
      to: a directory that does not exist yet; it is whole or not there.
      dtype: of the tensors, float32 or bfloat16.
      shard_bytes: most bytes of a file of tensors; the host holds one at a time.
    Raises:
      UserError: no such checkpoint, or a model that drops tokens or has several streams.
    """
    directory = restoring.checkpoint_directory(checkpoint_directory)
    restored = restoring.restore(directory, step)
    opened = checkpoint.open_step(directory, step)
    folder = checkpoint.tokenizer_directory(opened.directory)
    hashes = opened.metadata.get('tokenizer_files', {})  # each has been held against its file
    contents = {name: (folder / name).read_bytes() for name in hashes}
    said = opened.metadata.get('origin')
    origin = said.get('config') if isinstance(said, dict) else None
    origin = origin if isinstance(origin, dict) else {}
    return write(restored, contents, to, origin=origin, dtype=dtype, shard_bytes=shard_bytes)


def write(
    restored: restoring.Restored,
    contents: dict[str, bytes],
    to: epath.PathLike,
    *,
    origin: dict[str, Any],
    dtype: str,
    shard_bytes: int,
) -> str:
    """Writes what `export` does, of a model that is there.

    Args:
      contents: the tokenizer's files, by name.
      origin: values of the config.json that the model came with.
    """
    model, to = restored.config.model, checkpoint.absolute(to)
    require(
        not (model.moe.capacity_factor and any(k.startswith('moe') for k in model.layer_kinds)),
        f'model.moe.capacity_factor={model.moe.capacity_factor} drops tokens, which no exported '
        'model does; train with 0.',
    )
    families.require_one_stream(model)
    arrays = flatten_dict(restored.variables['params'], sep='.')
    biases = flatten_dict(restored.variables.get('router', {}), sep='.')
    arrays |= {f'{names.ROUTER}{name}': bias for name, bias in biases.items()}
    biased = any(bool((np.asarray(bias) != 0).any()) for bias in biases.values())
    family = families.of(model, biased_router=biased)
    values = ours(model) if family == families.OURS else families.write(family, model)
    ends = {f'{end}_token_id': getattr(restored.tokenizer, f'{end}_id') for end in ('bos', 'eos')}
    values |= ends | {name: origin[name] for name in KEPT if name in origin} | {'dtype': dtype}

    unfinished = to.parent / f'{to.name}.unfinished'
    require(not unfinished.exists(), f'{unfinished} is left from an export; remove it.')
    unfinished.mkdir(parents=True)
    write_tensors(unfinished, names.pieces(model, family), arrays, dtype, shard_bytes)
    (unfinished / CONFIG).write_text(json.dumps(values, indent=1))
    if family == families.OURS:
        source = epath.Path(__file__).parent / MODELING
        (unfinished / MODELING).write_text(source.read_text())
    tokenizers.write(restored.tokenizer, contents, unfinished)
    unfinished.rename(to)
    return family


def write_tensors(
    directory: epath.Path,
    pieces: list[names.Counterpart],
    arrays: dict[str, Any],
    dtype: str,
    shard_bytes: int,
) -> None:
    """Writes one file, or several and their index."""
    kind = np.dtype(DTYPES[dtype])
    groups = tensors.shards(pieces, kind.itemsize, shard_bytes)
    named = {tensors.SINGLE: groups[0]}
    if len(groups) > 1:
        total = len(groups)
        named = {
            f'model-{i:05}-of-{total:05}.safetensors': group
            for i, group in enumerate(groups, start=1)
        }
        num_bytes = sum(math.prod(piece.shape) for piece in pieces) * kind.itemsize
        tensors.write_index(directory, named, num_bytes)
    for file, group in named.items():
        content = {}
        for piece in group:
            slice_ = np.asarray(arrays[piece.weight.name][piece.place])
            content[piece.name] = piece.to_theirs(slice_).astype(kind)
        tensors.write(directory / file, content)


def ours(model: config.Model) -> dict[str, Any]:
    """Returns the config.json of a model that modeling_helios.py runs."""
    name = MODELING.removesuffix('.py')
    return {
        'architectures': ['HeliosForCausalLM'],
        'model_type': families.OURS,
        'auto_map': {
            'AutoConfig': f'{name}.HeliosConfig',
            'AutoModelForCausalLM': f'{name}.HeliosForCausalLM',
        },
        **families.sizes(model),
        'max_position_embeddings': rope.longest(model.rope),
        'helios': dataclasses.asdict(model),
    }
