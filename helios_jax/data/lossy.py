"""Finds what decoding gives back of a text, and which token gives back which bytes.

Bits per byte compare between tokenizers only where nothing is lost: whoever drops a character is
not charged for predicting it. So what decoding does not give back (a character outside the
vocabulary, a capital that a normaliser lowers, a space that it removes) is counted, and no token is
credited with its bytes.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

if TYPE_CHECKING:
    from helios_jax.data.tokenizer import Tokenizer

# Of text that comes back otherwise, characters that are compared: the time is quadratic.
LONGEST_COMPARED = 4096


class Encoded(NamedTuple):
    """A text as tokens, with the bytes that each of them gives back."""

    ids: UInt32[np.ndarray, 'tokens']
    num_bytes: UInt32[np.ndarray, 'tokens']  # UTF-8 bytes of `kept`, by token
    kept: str  # the characters that decoding gives back: the text itself where nothing is lost


def token_lengths(vocabulary: dict[str, int], size: int) -> UInt32[np.ndarray, 'V']:
    """Bytes of each token of a byte-level vocabulary, where one character stands for one byte.

    For any other vocabulary the numbers mean nothing: they do not add up to a text's length.
    """
    lengths = np.zeros(size, np.uint32)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    return lengths


def byte_ends(spans: Sequence[tuple[int, int]], text: str) -> Int64[np.ndarray, 'tokens']:
    """Finds where each token ends in the UTF-8 text, from its start and end in characters."""
    char_ends = np.asarray([end for _, end in spans], np.int64)
    code_points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    widths = 1 + sum((code_points > limit).astype(np.int64) for limit in (0x7F, 0x7FF, 0xFFFF))
    return np.concatenate([[0], np.cumsum(widths)])[char_ends]


def bytes_per_token(
    byte_ends: Int64[np.ndarray, 'tokens'], text: str
) -> UInt32[np.ndarray, 'tokens']:
    """Bytes per token, from where each one ends in the UTF-8 text.

    One character's tokens share its bytes as their ends say; white space that decoding puts between
    tokens goes to the token after it, or to the last one.
    """
    ends = np.maximum.accumulate(byte_ends)
    ends[-1:] = len(text.encode())
    return np.diff(ends, prepend=0).astype(np.uint32)


def keeps_all(tokenizer: 'Tokenizer', text: str, ids: list[int], returned: str) -> bool:
    """True if nothing of `text` is lost in its tokens `ids`, which decode to `returned`.

    A space that decoding adds at an end loses nothing. One that it strips from the start is not
    lost if the tokens still tell of it, that is if the text without it has other tokens.
    """
    if returned in (text, f' {text}', f'{text} '):
        return True
    return f' {returned}' in (text, f'{text} ') and tokenizer.encode(text[1:]) != ids


def partly(
    tokenizer: 'Tokenizer', text: str, ids: list[int], spans: Sequence[tuple[int, int]]
) -> Encoded:
    """Encodes a text that does not come back whole: finds what each token gives back of it.

    Args:
      spans: start and end of each token in the text, in characters. Those of a BPE that
        drops characters are wrong, but then its tokens are found in the text.
    """
    found = list(_found(tokenizer, text, ids))
    return max((_compared(tokenizer, text, ids, s) for s in (spans, found)), key=_total)


def _total(encoded: Encoded) -> int:
    return int(encoded.num_bytes.sum(dtype=np.int64))


def _found(tokenizer: 'Tokenizer', text: str, ids: list[int]) -> Iterator[tuple[int, int]]:
    """Yields the span where each token's own text comes next, or an empty one if it does not."""
    position = 0
    for index in ids:
        own = tokenizer.decode([index]).strip(' ')
        start = text.find(own, position, position + LONGEST_COMPARED) if own else -1
        if start < 0:
            yield position, position
        else:
            position = start + len(own)
            yield start, position


def _compared(
    tokenizer: 'Tokenizer', text: str, ids: list[int], spans: Sequence[tuple[int, int]]
) -> Encoded:
    """Compares tokens in groups that stand for whole characters.

    A group, decoded after the one before it, is compared with the characters since that one.
    """
    kept, num_bytes = [], np.zeros(len(ids), np.uint32)
    start, before = 0, ids[:0]
    for first, last, end in _groups(spans, len(text)):
        group = ids[first:last]
        common = ''
        if tokenizer.unk_id not in group:
            common = _common(text[start:end], decode_behind(tokenizer, before, group))
        kept.append(common)
        num_bytes[last - 1] = len(common.encode())
        start, before = end, group
    return Encoded(np.asarray(ids, np.uint32), num_bytes, ''.join(kept))


def _groups(spans: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int, int]]:
    """Yields runs of tokens that stand for whole characters: start, stop, end of their text.

    Tokens whose spans overlap belong together (the bytes of a character), and one with an empty
    span to what follows it. The last run reaches to the end of the text.
    """
    first, start, reached = 0, 0, 0
    for last, (_, end) in enumerate(spans, 1):
        reached = max(reached, end)
        if last == len(spans):
            yield first, last, length
        elif reached > start and spans[last][0] >= reached:
            yield first, last, reached
            first, start = last, reached


def decode_behind(tokenizer: 'Tokenizer', before: list[int], group: list[int]) -> str:
    """Text that `group` adds to that of `before`: decoders treat the start of a text apart."""
    alone, both = tokenizer.decode(before), tokenizer.decode([*before, *group])
    return both[len(alone) :] if both.startswith(alone) else tokenizer.decode(group)


def _common(source: str, returned: str) -> str:
    """Characters of `source` that `returned` has too, in their order."""
    if source == returned:
        return source
    if min(len(source), len(returned)) > LONGEST_COMPARED:
        return ''
    matcher = difflib.SequenceMatcher(None, source, returned, autojunk=False)
    return ''.join(source[m.a : m.a + m.size] for m in matcher.get_matching_blocks())
