"""RULER's tasks that need no text but what is made here (2404.06654).

They differ from RULER's own in three things: words are made of syllables and not taken from a list,
noise stands in the place of essays, and lists of common words are as long as the prompt leaves room
for, whatever its length.
"""

import random
from collections.abc import Callable

from helios_jax.evaluate.prompts import Puzzle, in_noise

NUM_KEYS = 4  # of niah_multikey
NUM_HOPS = 4  # of vt: assignments after the first
NUM_COMMON = 10  # of cwe: words to be found
FEWEST_REPEATS = 3  # of cwe: how often a common word stands in the shortest list
NUM_FREQUENT = 3  # of fwe: words to be found
ZETA_EXPONENT = 2.0  # of fwe: the word of rank k has a share of about k^−2
FEWEST_CODED = 40  # of fwe: from so many words on the first ranks differ
NIAH = (
    'Some special magic numbers are hidden within the following text. Make sure to memorize them. '
    'I will quiz you about the numbers afterwards.\n'
)
VT = 'Memorize and track the chain of variable assignment hidden in the following text.\n'
CWE = (
    'Below is a numbered list of words. In these words, some appear more often than others. '
    'Memorize the ones that appear most often.\n'
)
FWE = (
    'Read the following coded text and track the frequency of each coded word. Find the three most '
    'frequently appeared coded words.\n'
)


def niah(rng: random.Random, num_keys: int = 1) -> Puzzle:
    """Hides numbers with their names at random depths, and asks for one of them."""
    keys, values = words(rng, num_keys), rng.sample(range(1_000_000, 10_000_000), num_keys)
    needles = [
        (rng.random(), f'One of the special magic numbers for {key} is: {value}.')
        for key, value in zip(keys, values, strict=True)
    ]
    question = (
        f'\nWhat is the special magic number for {keys[0]} mentioned in the provided text? '
        f'The special magic number for {keys[0]} mentioned in the provided text is'
    )
    return Puzzle(NIAH, in_noise(needles), question, (str(values[0]),))


def niah_multikey(rng: random.Random) -> Puzzle:
    return niah(rng, NUM_KEYS)


def variable_tracking(rng: random.Random) -> Puzzle:
    """Hides a chain of assignments, in their order, and asks for all variables of its value."""
    names = [word.upper() for word in words(rng, NUM_HOPS + 1)]
    value = rng.randrange(10_000, 100_000)
    sources = [str(value), *(f'VAR {name}' for name in names[:-1])]
    lines = [f'VAR {name} = {source}.' for name, source in zip(names, sources, strict=True)]
    depths = sorted(rng.random() for _ in lines)
    question = (
        f'\nQuestion: Find all variables that are assigned the value {value} in the text above. '
        'Answer: According to the chain of variable assignment in the text above, '
        f'{len(names)} variables are assigned the value {value}, they are:'
    )
    body = in_noise(list(zip(depths, lines, strict=True)))
    return Puzzle(VT, body, question, tuple(names))


def common_words(rng: random.Random) -> Puzzle:
    """Repeats ten words among as many others, each of which stands in the list once."""
    common, seed = words(rng, NUM_COMMON), rng.getrandbits(32)

    def body(num_repeats: int) -> str:
        order = random.Random(seed)
        others = set(common)
        listed = common * num_repeats
        while len(listed) < 2 * NUM_COMMON * num_repeats:
            (word,) = words(order, 1)
            if word not in others:
                others.add(word)
                listed.append(word)
        order.shuffle(listed)
        return ' '.join(f'{number}. {word}' for number, word in enumerate(listed, 1))

    question = (
        f'\nQuestion: What are the {NUM_COMMON} most common words in the above list? '
        f'Answer: The top {NUM_COMMON} words that appear most often in the list are:'
    )
    return Puzzle(CWE, body, question, tuple(common), FEWEST_REPEATS)


def frequent_words(rng: random.Random) -> Puzzle:
    """Draws words of Zipf's frequencies, and asks for the three most frequent ones."""
    seed = rng.getrandbits(32)
    ranked = words(rng, NUM_FREQUENT)

    def body(num_words: int) -> str:
        order = random.Random(seed)
        listed: list[str] = []
        rank, total = 1, sum(k**-ZETA_EXPONENT for k in range(1, num_words + 1))
        used = set(ranked)
        while len(listed) < num_words:
            word = ranked[rank - 1] if rank <= len(ranked) else words(order, 1)[0]
            if rank > len(ranked) and word in used:
                continue
            used.add(word)
            count = max(1, round(num_words * rank**-ZETA_EXPONENT / total))
            listed += [word] * min(count, num_words - len(listed))
            rank += 1
        order.shuffle(listed)
        return ' '.join(listed)

    question = (
        '\nQuestion: What are the three most frequently appeared words in the above coded text? '
        'Answer: According to the coded text above, the three most frequently appeared words are:'
    )
    return Puzzle(FWE, body, question, tuple(ranked), FEWEST_CODED)


def words(rng: random.Random, count: int) -> list[str]:
    """Makes different words of three syllables, none of which is a part of another."""
    made: dict[str, None] = {}
    while len(made) < count:
        made[''.join(rng.choice('bdfgklmnprstvz') + rng.choice('aeiou') for _ in range(3))] = None
    return list(made)


TASKS: dict[str, Callable[[random.Random], Puzzle]] = {
    'niah': niah,
    'niah_multikey': niah_multikey,
    'vt': variable_tracking,
    'cwe': common_words,
    'fwe': frequent_words,
}
