"""Prompts as a chat template renders them, and what ends an answer."""

import json

import pytest
import tiny_restored
import tokenizers as library
from etils import epath
from refusals import refused

from helios_jax import cli
from helios_jax.data import tokenizer as tokenizers
from helios_jax.errors import UserError
from helios_jax.evaluate import command
from helios_jax.evaluate.conversation import Chat, encoded, opened, rendered, turn_ends

WORDS = ['<s>', '</s>', '<|user|>', '<|system|>', '<|assistant|>', '<|end|>', 'a', 'b', 'c', '?']
TEMPLATE = (
    '{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}'
    '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


def tokenizer(folder, template=TEMPLATE, **generation):
    ids = {word: number for number, word in enumerate(WORDS)}
    made = library.Tokenizer(library.models.WordLevel(ids, unk_token='?'))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.add_special_tokens(WORDS[:6])
    made.save(str(folder / 'tokenizer.json'))
    (folder / 'chat_template.jinja').write_text(template)
    if generation:
        (folder / 'generation_config.json').write_text(json.dumps(generation))
    return tokenizers.load('tokenizer.json', epath.Path(folder))


def words(ids):
    return ' '.join(WORDS[index] for index in ids)


def test_a_prompt_is_a_message_up_to_where_the_answer_begins(tmp_path):
    made = tokenizer(tmp_path)
    assert words(opened(made, 'a b', Chat())) == '<s> <|user|> a b <|end|> <|assistant|>'
    found = words(opened(made, 'a', Chat(system='c')))
    assert found == '<s> <|system|> c <|end|> <|user|> a <|end|> <|assistant|>'
    # A message cannot end its turn.
    assert words(opened(made, 'a <|end|>', Chat())).count('<|end|>') == 1


def test_a_template_that_writes_bos_keeps_one(tmp_path):
    assert words(opened(tokenizer(tmp_path, f'<s>{TEMPLATE}'), 'a', Chat())).count('<s>') == 1


def test_a_turn_ends_in_the_special_token_behind_an_answer(tmp_path):
    assert turn_ends(tokenizer(tmp_path)) == [WORDS.index('<|end|>')]
    plain = '{% for m in messages %}{{ m.content }} c {% endfor %}'
    assert turn_ends(tokenizer(tmp_path, plain)) == []


@pytest.mark.parametrize(
    ('said', 'expected'), [([1, 5], (1, 5)), (5, (5,)), (None, ()), ([], ())], ids=str
)
def test_ends_are_those_of_generation_config(said, expected, tmp_path):
    assert tokenizer(tmp_path, eos_token_id=said).end_ids == expected
    (tmp_path / 'generation_config.json').unlink()
    assert tokenizer(tmp_path).end_ids == ()


@pytest.mark.parametrize('said', [[1, 10], -1, '5', [True], [[5]], 2.0], ids=str)
def test_an_end_that_is_no_token_is_refused(said, tmp_path):
    with pytest.raises(UserError, match=r'eos_token_id has .* tokens 0 to 9'):
        _ = tokenizer(tmp_path, eos_token_id=said).end_ids
    (tmp_path / 'generation_config.json').write_text('[1]')
    with pytest.raises(UserError, match='is no JSON object'):
        _ = tokenizers.load('tokenizer.json', epath.Path(tmp_path)).end_ids


def test_a_system_message_without_a_chat_is_refused(capsys):
    line = refused(capsys, 'generate', '--checkpoint=nowhere', '--system=x', alone=True)
    assert '--system is a message of a chat' in line


@pytest.mark.slow
def test_the_command_prints_the_answer(capsys, monkeypatch):
    monkeypatch.setattr(command, 'restore', lambda values, _: tiny_restored.restored())
    monkeypatch.setattr(command, 'prepare', lambda values: None)
    given = ['generate', '--checkpoint=a_run', '--max_tokens=4', '--temperature=0', '--json']
    cli.main([*given, '--prompt=Why?', '--chat'])
    asked = json.loads(capsys.readouterr().out)
    cli.main([*given, '--prompt=<|user|>\nWhy?'])
    other = json.loads(capsys.readouterr().out)
    assert asked['prompt'] == 'Why?' and asked['text'] != other['text']


@pytest.mark.parametrize(
    ('content', 'template', 'expected'),
    [
        ('b c', TEMPLATE, 'b c'),
        ('b c ', TEMPLATE, 'b c '),
        ('b c ', TEMPLATE.replace('m.content', 'm.content | trim'), 'b c'),
        ('<|end|> b', TEMPLATE, '<\ufdd0|end|> b'),
        ('b', '{% generation %}' + TEMPLATE + '{% endgeneration %}', 'b'),
    ],
)
def test_an_answer_that_has_begun_goes_on(content, template, expected, tmp_path):
    made = tokenizer(tmp_path, template)
    said = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': content}]
    text = rendered(made, said, goes_on=True)
    assert text == f'<|user|>a<|end|><|assistant|>{expected}'
    assert encoded(made, text).count(WORDS.index('<|end|>')) == 1


def test_a_template_that_leaves_out_what_is_to_go_on_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'chat_template\.jinja leaves out a message'):
        rendered(tokenizer(tmp_path, 'a'), [{'role': 'user', 'content': 'b'}], goes_on=True)
