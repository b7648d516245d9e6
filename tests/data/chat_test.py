import json

import chats
import pytest
from etils import epath

from helios_jax.data import chat, corpora, tokenizer
from helios_jax.errors import UserError

# Qwen 3 takes the thoughts out of every answer but the last.
FORGETS = (
    '{% for m in messages %}{{ m.role }}: '
    '{% if loop.last %}(thought) {% endif %}{{ m.content }}\n{% endfor %}'
    '{% if add_generation_prompt %}assistant: {% endif %}'
)
OTHER_PROMPT = chats.CHATML.replace('<|im_start|>assistant', '<|start|>assistant')


def bytes_with(tmp_path, template: str) -> tokenizer.Tokenizer:
    (tmp_path / 'my.jinja').write_text(template)
    return tokenizer.load('bytes', chat_setting=str(tmp_path / 'my.jinja'))


def answers(conversation: chat.Conversation) -> list[str]:
    return [conversation.text[start:end] for start, end in conversation.answers]


def test_the_plain_template_writes_turns_that_end_in_eos():
    conversation = chat.training(tokenizer.load('bytes'), chats.MESSAGES[1:4], '')
    assert conversation.text == (
        '<|user|>\nhello there<|eos|><|assistant|>\nhi 😀 you<|eos|><|user|>\nmore<|eos|>'
    )
    assert answers(conversation) == ['hi 😀 you<|eos|>']


@pytest.mark.parametrize('template', [chats.CHATML, chats.CHATML_BLOCKS], ids=['prefix', 'blocks'])
def test_every_answer_is_found_with_the_end_of_its_turn(tmp_path, template):
    conversation = chat.training(bytes_with(tmp_path, template), chats.MESSAGES, '')
    assert answers(conversation) == ['hi 😀 you<|im_end|>\n', 'the quick brown fox<|im_end|>\n']
    assert conversation.cuts == []


def test_an_opened_answer_is_how_the_conversation_goes_on(tmp_path):
    tok = bytes_with(tmp_path, chats.CHATML)
    whole = chat.training(tok, chats.MESSAGES, '')
    for number in (2, 4):
        opened = chat.render(tok, chats.MESSAGES[:number], '', add_generation_prompt=True)
        assert opened.text == whole.text[: whole.answers[number // 2 - 1][0]]
    assert chat.render(tok, chats.MESSAGES, '').text == whole.text


def test_answers_in_a_row_are_two(tmp_path):
    twice = [chats.MESSAGES[1], chats.MESSAGES[2], chats.MESSAGES[4]]
    conversation = chat.training(bytes_with(tmp_path, chats.CHATML), twice, '')
    assert answers(conversation) == [
        'hi 😀 you<|im_end|>\n', 'the quick brown fox<|im_end|>\n'
    ]  # fmt: skip


@pytest.mark.parametrize('template', [FORGETS, OTHER_PROMPT], ids=['forgets', 'other prompt'])
def test_a_template_whose_answers_cannot_be_told_is_refused(tmp_path, template):
    told = r'^a\.jsonl:7: .*my\.jinja renders up to message 3 is not how .* \{% generation %\}'
    with pytest.raises(UserError, match=told) as refused:
        chat.training(bytes_with(tmp_path, template), chats.MESSAGES, 'a.jsonl:7')
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'block',
    ['{{ m.content }}{% if m.role == "tool" %}{% generation %}x{% endgeneration %}{% endif %}',
     '{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x[3:] }}'],
    ids=['of no answer', 'cut apart'],
)  # fmt: skip
def test_blocks_that_hold_no_answer_are_refused(tmp_path, block):
    tok = bytes_with(tmp_path, '{% for m in messages %}' + block + '{% endfor %}')
    with pytest.raises(UserError, match=r'^a\.jsonl:7: .*my\.jinja marks no whole answer'):
        chat.training(tok, chats.MESSAGES, 'a.jsonl:7')


def test_names_of_special_tokens_in_messages_are_cut_and_the_text_stays(tmp_path):
    content = 'x<|im_end|>\n<|im_start|>system\n<<|eos|>'
    messages = [{'role': 'user', 'content': content, 'calls': [{'a': '<|bos|>'}]}]
    messages.append({'role': 'assistant', 'content': 'y<|eos|>'})
    tok = bytes_with(tmp_path, '{{ messages[0].calls | tojson }}' + chats.CHATML)
    conversation = chat.training(tok, messages, '')
    cut = sorted(conversation.text[place - 1 : place + 4] for place in conversation.cuts)
    assert cut == ['<|bos', '<|eos', '<|eos']  # bytes have no ChatML
    assert content in conversation.text and '"<|bos|>"' in conversation.text
    assert answers(conversation) == ['y<|eos|><|im_end|>\n']


def test_messages_are_read_from_records_as_they_are(tmp_path):
    messages = [*chats.MESSAGES[:3], {'role': 'tool', 'content': '', 'name': 'é'}]
    (tmp_path / 'a.jsonl').write_text('\n' + json.dumps({'messages': messages, 'id': 3}))
    (document,) = corpora.read(str(tmp_path / 'a.jsonl'))
    assert (document.prompt, document.text) == ('', '')
    assert json.loads(document.messages) == messages
    assert document.place == f'{tmp_path}/a.jsonl:2'
    (text,) = corpora.texts(str(tmp_path / 'a.jsonl'))
    assert text == '\n'.join(message['content'] for message in messages)


@pytest.mark.parametrize(
    ('record', 'message'),
    [
        ({'messages': 'hi'}, r'"messages" must be a list of objects with the strings "role"'),
        ({'messages': ['hi']}, r'"messages" must be a list of objects'),
        ({'messages': []}, r"no message of the role 'assistant'"),
        ({'messages': chats.MESSAGES[:2]}, r"no message of the role 'assistant'"),
        ({'messages': [{'role': 'assistant'}]}, r'"content" of message 1 is None; it must be a'),
        ({'messages': [*chats.MESSAGES, {'role': 'x', 'content': []}]}, r'"content" of mess.* 6'),
        ({'messages': [{'content': 'x'}]}, r'"role" of message 1 is None'),
        ({'messages': [{'role': 'assistant', 'content': '\ud800'}]}, r'has half a surrogate pair'),
        ({'messages': [{'role': 'assistant', 'content': '\ufdd1'}]}, r'U\+FDD0 to U\+FDD2'),
        ({'messages': chats.MESSAGES, 'tools': [{}]}, r'has "tools", which are not rendered'),
        ({'message': chats.MESSAGES}, r'must have the string "text", .* or the list "messages"'),
    ],
)  # fmt: skip
def test_records_that_are_no_conversation_are_refused_with_their_line(tmp_path, record, message):
    lines = [json.dumps({'messages': chats.MESSAGES}), json.dumps(record)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    with pytest.raises(UserError, match=rf'^{tmp_path}/a\.jsonl:2:? .*{message}') as refused:
        list(corpora.read(str(tmp_path / 'a.jsonl')))
    assert '\n' not in str(refused.value)


def test_the_template_travels_with_the_directory_of_a_tokenizer(tmp_path):
    tok = bytes_with(tmp_path, chats.CHATML)
    config = epath.Path(tmp_path) / 'tokenizer_config.json'
    config.write_text(tok.chat_template.config())
    again = tokenizer.load('bytes', epath.Path(tmp_path))
    assert again.chat_template.fingerprint == tok.chat_template.fingerprint
    assert again.chat_template.source == chats.CHATML
