"""Finds special tokens: BOS and EOS by their usual names, and the names that a text holds."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from helios_jax.errors import UserError, require

# In order of preference. GPT-2 has one token for both; BERT's brackets come last.
BOS_NAMES = ('<|bos|>', '<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '[BOS]')
EOS_NAMES = ('<|eos|>', '</s>', '<eos>', '<|end_of_text|>', '[EOS]')
SHARED_NAMES = ('<|endoftext|>',)
CANDIDATES = {'BOS': BOS_NAMES + SHARED_NAMES, 'EOS': EOS_NAMES + SHARED_NAMES}


class Spanned(NamedTuple):
    """Tokens of a text, and where each one starts and ends in it, in characters."""

    ids: list[int]
    spans: list[tuple[int, int]]


def find(tokenizer: str, role: str, vocabulary: Mapping[str, int]) -> int:
    """Finds the id of BOS or EOS.

    Args:
      tokenizer: its name, for the message.
      role: 'BOS' or 'EOS'.
    Raises:
      UserError: none of the usual names is in the vocabulary.
    """
    for candidate in CANDIDATES[role]:
        if candidate in vocabulary:
            return vocabulary[candidate]
    raise UserError(
        f'data.tokenizer={tokenizer!r} has no {role}: none of {", ".join(CANDIDATES[role])} is in '
        'it.'
    )


def end_ids(said: Any, vocab_size: int, place: str) -> tuple[int, ...]:
    """Reads an `eos_token_id` of transformers: a number, a list of them, or null.

    Args:
      place: where it stands, for the message.
    Raises:
      UserError: one that is no token's number.
    """
    numbers = said if isinstance(said, list) else [] if said is None else [said]
    for number in numbers:
        require(
            type(number) is int and 0 <= number < vocab_size,
            f'{place}: eos_token_id has {number!r:.40}, but the tokenizer has tokens 0 to '
            f'{vocab_size - 1}; put back the tokenizer that belongs to it.',
        )
    return tuple(numbers)


def unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int:
    """Id that a tokenizer.json gives to what is not in its vocabulary; -1 without one."""
    number = model.get('unk_id')  # Unigram has its number, the others its name
    return vocabulary.get(model.get('unk_token') or '', -1) if number is None else number


def starts(names: Iterable[str]) -> re.Pattern[str]:
    """Makes a pattern of the first character of any of the names; those of one are left out."""
    long = [name for name in names if len(name) > 1]
    ahead = [f'{re.escape(name[0])}(?={re.escape(name[1:])})' for name in long]
    return re.compile('|'.join(ahead) or '(?!)')


def in_parts(text: str, ids: Mapping[str, int], encode: Callable[[str], Spanned]) -> Spanned:
    """Encodes a text whose special tokens are found by name, the longest first.

    Args:
      ids: those of the special tokens, by name.
      encode: encodes the text between them, a part at a time.
    """
    longest_first = sorted(ids, key=len, reverse=True)
    made, start = Spanned([], []), 0
    for part in re.split(f'({"|".join(map(re.escape, longest_first))})', text):
        own = Spanned([ids[part]], [(0, len(part))]) if part in ids else encode(part)
        made.ids.extend(own.ids)
        made.spans.extend((first + start, last + start) for first, last in own.spans)
        start += len(part)
    return made
