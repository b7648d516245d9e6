"""Prompts of an exact number of tokens, whose answers are hidden in them."""

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

from helios_jax.data.tokenizer import Tokenizer
from helios_jax.errors import require

# The text in which passkeys are hidden since 2305.16300.
NOISE = (
    'The grass is green.', 'The sky is blue.', 'The sun is yellow.', 'Here we go.',
    'There and back again.',
)  # fmt: skip
SPARE_TOKENS = 16  # for what a model writes before and between the answers


class Puzzle(NamedTuple):
    """A question about a text that can be made as long as one likes."""

    opening: str
    body: Callable[[int], str]  # the text, of so many sentences or words
    question: str
    answers: tuple[str, ...]  # each of which the continuation should have
    smallest: int = 1  # sentences or words that the body needs


class Prompt(NamedTuple):
    tokens: list[int]  # BOS first
    answers: tuple[str, ...]
    room: int  # tokens to write


def fit(puzzle: Puzzle, tokenizer: Tokenizer, length: int) -> Prompt:
    """Makes a prompt that has, with the tokens to be written after it, exactly `length` tokens.

    The body is as long as fits. What is then left is filled with noise, in front of the text.

    Raises:
      UserError: not even the shortest body fits.
    """
    room = len(tokenizer.encode(', '.join(puzzle.answers))) + SPARE_TOKENS

    def tokens(size: int) -> list[int]:
        return tokenizer.encode(puzzle.opening + puzzle.body(size) + puzzle.question)

    space = length - room - 1
    least = len(tokens(puzzle.smallest))
    require(
        least <= space,
        f'length={length} is too short for a prompt that takes {least + room + 1} tokens; leave '
        'this length or this task out.',
    )
    too_large = 2 * puzzle.smallest
    while len(tokens(too_large)) <= space:
        too_large *= 2
    sizes = range(puzzle.smallest, too_large)
    fitting = bisect.bisect_right(sizes, space, key=lambda size: len(tokens(size)))
    found = tokens(sizes[fitting - 1])
    rest = space - len(found)
    filler = tokenizer.encode(' '.join(noise(rest)))[:rest]  # a sentence has some tokens
    return Prompt([tokenizer.bos_id, *filler, *found], puzzle.answers, room)


def noise(num_sentences: int) -> list[str]:
    return [NOISE[i % len(NOISE)] for i in range(num_sentences)]


def in_noise(needles: Sequence[tuple[float, str]]) -> Callable[[int], str]:
    """Makes the body of an `Puzzle`: noise, with sentences hidden at depths from 0 to 1."""

    def body(num_sentences: int) -> str:
        sentences = noise(num_sentences)
        # From the end, so that of two between the same sentences the first stays first.
        for depth, needle in reversed(sorted(needles, key=lambda needle: needle[0])):
            sentences.insert(round(depth * num_sentences), needle)
        return ' '.join(sentences)

    return body


def accuracy(prompts: Sequence[Prompt], texts: Sequence[str]) -> float:
    """Mean over prompts of the share of its answers that a continuation has, as RULER counts."""
    shares = [
        sum(answer.lower() in text.lower() for answer in prompt.answers) / len(prompt.answers)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return sum(shares) / len(shares)
