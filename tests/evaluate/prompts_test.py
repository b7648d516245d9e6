"""Prompts have the tokens that are asked for, and hide what they should, once."""

import itertools
import random
import re
from collections import Counter

import pytest
from etils import epath

from helios_jax.data import tokenizer as tokenizers
from helios_jax.data.bpe import train_bpe
from helios_jax.errors import UserError
from helios_jax.evaluate import ruler
from helios_jax.evaluate.passkey import passkey
from helios_jax.evaluate.prompts import SPARE_TOKENS, Prompt, accuracy, fit, noise

BYTES = tokenizers.load('bytes')
TASKS = {'passkey': lambda rng: passkey(rng, 0.25), **ruler.TASKS}


@pytest.fixture(scope='module')
def bpe(tmp_path_factory) -> tokenizers.Tokenizer:
    """Tokens of several letters, so that a word more or less is no token more or less."""
    path = epath.Path(tmp_path_factory.mktemp('bpe') / 'tokenizer.json')
    text = ' '.join(noise(5)) + ruler.NIAH + ruler.CWE + ' '.join(ruler.words(random.Random(1), 50))
    train_bpe([text] * 3, 330, path)
    return tokenizers.load(str(path))


def made(task: str, length: int, tokenizer=BYTES, seed: int = 0) -> Prompt:
    return fit(TASKS[task](random.Random(seed)), tokenizer, length)


@pytest.mark.parametrize('task', TASKS)
def test_a_prompt_and_its_answer_have_exactly_the_length_and_repeat_by_seed(task, bpe):
    for tokenizer in (BYTES, bpe):
        for length in (1357, 1358, 3000):
            prompt = made(task, length, tokenizer)
            assert prompt.tokens[0] == tokenizer.bos_id
            assert len(prompt.tokens) + prompt.room == length
            answers = tokenizer.encode(', '.join(prompt.answers))
            assert prompt.room == len(answers) + SPARE_TOKENS
    assert made(task, 3000) == made(task, 3000) != made(task, 3000, seed=1)


@pytest.mark.parametrize('task', TASKS)
def test_the_end_of_a_prompt_is_whole_and_what_fills_it_is_short(task):
    text = BYTES.decode(made(task, 3000).tokens)
    example = TASKS[task](random.Random(0))
    start = text.index(example.opening)
    assert text.endswith(example.question) and text.count(example.opening) == 1
    assert start < 500
    assert ' '.join(noise(start))[:start] == text[:start]


@pytest.mark.parametrize('depth', [0.0, 0.5, 1.0])
def test_a_passkey_is_hidden_once_at_its_depth(depth):
    prompt = fit(passkey(random.Random(5), depth), BYTES, 4000)
    text, (key,) = BYTES.decode(prompt.tokens), prompt.answers
    needle = f'The pass key is {key}. Remember it. {key} is the pass key.'
    assert text.count(needle) == 1 and text.count(key) == 2
    body = text[text.index('there.\n') : text.index('\nWhat is the pass key?')]
    assert abs(body.index(needle) / (len(body) - len(needle)) - depth) < 0.02


@pytest.mark.parametrize(('task', 'keys'), [('niah', 1), ('niah_multikey', ruler.NUM_KEYS)])
def test_each_needle_is_there_once_and_one_is_asked_for(task, keys):
    prompt = made(task, 4000)
    text = BYTES.decode(prompt.tokens)
    needles = dict(re.findall(r'special magic numbers for (\w+) is: (\d+)\.', text))
    assert len(needles) == keys
    (asked,) = set(re.findall(r'number for (\w+) mentioned', text))
    assert (needles[asked],) == prompt.answers and text.count(needles[asked]) == 1


def test_a_chain_of_variables_is_assigned_in_its_order():
    prompt = made('vt', 4000)
    text = BYTES.decode(prompt.tokens)
    found = re.findall(r'VAR (\w+) = (?:VAR )?(\w+)\.', text)
    assert tuple(name for name, _ in found) == prompt.answers
    assert [source for _, source in found[1:]] == list(prompt.answers[:-1])
    assert f'assigned the value {found[0][1]}' in text and found[0][1].isdecimal()


def test_common_words_are_those_that_repeat_and_frequent_ones_lead():
    prompt = made('cwe', 4000)
    listed = Counter(re.findall(r'\d+\. (\w+)', BYTES.decode(prompt.tokens)))
    assert {word for word, count in listed.items() if count > 1} == set(prompt.answers)
    repeats = listed[prompt.answers[0]]
    assert repeats >= ruler.FEWEST_REPEATS
    assert sorted(listed.values()) == [1] * (10 * repeats) + [repeats] * 10
    for length in (800, 1500, 5000):
        prompt = made('fwe', length)
        coded = BYTES.decode(prompt.tokens).split('coded words.\n')[1].split('\nQuestion')[0]
        counts = Counter(coded.split()).most_common(4)
        assert tuple(word for word, _ in counts[:3]) == prompt.answers
        assert all(a > b for (_, a), (_, b) in itertools.pairwise(counts))


def test_a_length_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r'length=200 is too short for a prompt that takes \d+'):
        made('cwe', 200)
    least = int(re.search(r'takes (\d+)', refusal('niah', 100))[1])
    assert len(made('niah', least).tokens) + made('niah', least).room == least
    assert f'length={least - 1}' in refusal('niah', least - 1)


def refusal(task: str, length: int) -> str:
    with pytest.raises(UserError) as caught:
        made(task, length)
    return str(caught.value)


def test_accuracy_is_the_share_of_answers_in_any_letters():
    prompts = [Prompt([], ('KEY', 'no'), 1), Prompt([], ('12',), 1)]
    assert accuracy(prompts, ['a key', '']) == 0.25
    assert accuracy(prompts, ['Key, NO', 'it is 12.']) == 1
    assert accuracy(prompts, ['', '1 2']) == 0
