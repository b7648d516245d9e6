"""Trains byte-level BPE tokenizers."""

import json
from collections.abc import Iterable

import tokenizers
from etils import epath

from helios_jax.errors import UserError


def train_bpe(documents: Iterable[str], vocab_size: int, path: epath.Path) -> None:
    """Trains a byte-level BPE of exactly `vocab_size` tokens, with <|bos|> and <|eos|>.

    Args:
      path: where the tokenizer.json goes.
    Raises:
      UserError: `vocab_size` leaves no room for the bytes, or the text is too small to fill it.
    """
    smallest = 256 + 2
    if vocab_size < smallest:
        raise UserError(
            f'vocab_size={vocab_size} must be {smallest} or more: the bytes, BOS and EOS.'
        )
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<|bos|>', '<|eos|>'],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise UserError(
            f'vocab_size={vocab_size} is out of reach: the text gives only '
            f'{bpe.get_vocab_size()} tokens; ask for fewer or train on more text.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(bpe.to_str()), ensure_ascii=False))
