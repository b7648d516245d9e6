"""Passkey retrieval: a number hidden at some depth of a text that is noise (2305.16300)."""

import random

from helios_jax.evaluate.prompts import Puzzle, in_noise

OPENING = (
    'There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. '
    'I will quiz you about the important information there.\n'
)


def passkey(rng: random.Random, depth: float) -> Puzzle:
    """Hides a number of five digits.

    Args:
      depth: from 0, the beginning, to 1, the end.
    """
    key = str(rng.randrange(10_000, 100_000))
    needle = f'The pass key is {key}. Remember it. {key} is the pass key.'
    question = '\nWhat is the pass key? The pass key is'
    return Puzzle(OPENING, in_noise([(depth, needle)]), question, (key,))
