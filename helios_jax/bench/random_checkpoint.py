"""Writes a Hugging Face directory of random weights, tensor by tensor, for other measurements."""

import json
import math
from collections.abc import Iterator

import numpy as np
import tokenizers
from etils import epath

from helios_jax import config
from helios_jax.convert import exporting, families, names, tensors
from helios_jax.convert.importing import CONFIG
from helios_jax.convert.tokenizers import SETTINGS
from helios_jax.errors import require

SHARD_BYTES = 2 * 10**9
BOS, EOS, UNK = 0, 1, 2
FIRST_WORD = 3  # of the tokenizer, whose other tokens are w3, w4, …


def write(cfg: config.Config, directory: epath.PathLike, dtype: str, seed: int = 0) -> str:
    """Writes the residual model of a config's shape; returns the family whose layout it has.

    Args:
      dtype: float32 or bfloat16.
    Raises:
      UserError: a model that no family of Hugging Face's has, or a vocabulary of no word.
    """
    length = cfg.model.rope.trained_length or cfg.data.row_length
    changes = {'gmu': config.GMU(kind='residual'), 'rope.trained_length': length}
    model = config.replace(cfg.model, changes, 'model.')
    require(
        model.vocab_size > FIRST_WORD,
        f'model.vocab_size={model.vocab_size} must be above {FIRST_WORD}.',
    )
    family = families.of(model)
    require(
        family != families.OURS,
        'no family of Hugging Face has all settings of this model; leave out those that only '
        'Helios has.',
    )
    values = families.write(family, model)
    values |= {'dtype': dtype, 'bos_token_id': BOS, 'eos_token_id': EOS}
    directory = epath.Path(directory)
    directory.mkdir(parents=True)
    (directory / CONFIG).write_text(json.dumps(values))
    kind = np.dtype(exporting.DTYPES[dtype])
    groups = tensors.shards(names.pieces(model, family), kind.itemsize, SHARD_BYTES)
    total, rng = len(groups), np.random.default_rng(seed)
    files = {f'model-{i:05}-of-{total:05}.safetensors': each for i, each in enumerate(groups, 1)}
    for file, pieces in files.items():
        tensors.write(directory / file, dict(_drawn(pieces, kind, rng)))
    num_bytes = sum(math.prod(piece.shape) for each in groups for piece in each) * kind.itemsize
    tensors.write_index(directory, files, num_bytes)
    _write_tokenizer(directory, model.vocab_size)
    return family


def _drawn(
    pieces: list[names.Counterpart], kind: np.dtype, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    for piece in pieces:
        if len(piece.shape) == 1:  # a norm's scale
            yield piece.name, np.ones(piece.shape, kind)
            continue
        drawn = rng.standard_normal(piece.shape, np.float32) / math.sqrt(piece.shape[-1])
        yield piece.name, drawn.astype(kind)


def _write_tokenizer(directory: epath.Path, size: int) -> None:
    """Writes a tokenizer of words, w3 and on, that spaces part."""
    words = {'<s>': BOS, '</s>': EOS, '<unk>': UNK}
    words |= {f'w{number}': number for number in range(FIRST_WORD, size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(['<s>', '</s>'])
    made.save(str(directory / 'tokenizer.json'))
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>',
    }  # fmt: skip
    (directory / SETTINGS).write_text(json.dumps(settings))
