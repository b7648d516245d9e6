import json
import re

import chats
import pytest
from etils import epath

from helios_jax.data import chat_template
from helios_jax.data.chat_template import Template
from helios_jax.errors import UserError

NAMES = {'bos_token': '<s>', 'eos_token': '</s>'}
ONE = [{'role': 'user', 'content': 'x'}]


def found(folder, setting: str = '', **files: object) -> Template:
    for name, content in files.items():
        (folder / f'{name}.{"jinja" if name == "chat_template" else "json"}').write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
    return chat_template.find(epath.Path(folder), setting, NAMES)


def test_the_template_is_the_named_one_or_the_tokenizers_or_the_plain_one(tmp_path):
    (tmp_path / 'named.jinja').write_text('named')
    assert found(tmp_path).source == chat_template.PLAIN
    assert chat_template.find(None, '', NAMES).source == chat_template.PLAIN
    assert found(tmp_path, tokenizer_config={'eos_token': 'e'}).source == chat_template.PLAIN
    assert found(tmp_path, tokenizer_config={'chat_template': 'config'}).source == 'config'
    several = [{'name': 'tool_use', 'template': 't'}, {'name': 'default', 'template': 'd'}]
    assert found(tmp_path, tokenizer_config={'chat_template': several}).source == 'd'
    assert found(tmp_path, chat_template='file').source == 'file'
    assert found(tmp_path, str(tmp_path / 'named.jinja')).source == 'named'


def test_names_of_special_tokens_are_the_tokenizer_configs_where_it_has_them(tmp_path):
    config = {'eos_token': {'content': '<|end|>'}, 'bos_token': None, 'pad_token': 'p', 'x': 'y'}
    template = found(tmp_path, tokenizer_config=config)
    assert template.tokens == {'bos_token': '<s>', 'eos_token': '<|end|>', 'pad_token': 'p'}


def test_a_template_is_found_again_in_the_config_that_it_writes(tmp_path):
    template = Template('a {{ bos_token }} é', 'somewhere', {'bos_token': 'b', 'eos_token': 'e'})
    (tmp_path / chat_template.CONFIG).write_text(template.config())
    again = found(tmp_path)
    assert (again.source, again.tokens) == (template.source, template.tokens)
    assert again.fingerprint == template.fingerprint
    others = [template._replace(source='a'), template._replace(tokens=NAMES)]
    assert template.fingerprint not in [other.fingerprint for other in others]


@pytest.mark.parametrize(
    ('files', 'setting', 'message'),
    [
        ({}, 'absent.jinja', r"data\.chat_template='absent\.jinja': no such file\."),
        ({}, 's3://a/b.jinja', r's3:// is not supported'),
        ({'tokenizer_config': '{"a":'}, '', r'tokenizer_config\.json is not JSON'),
        ({'tokenizer_config': [1]}, '', r'tokenizer_config\.json must hold a JSON object'),
        ({'tokenizer_config': {'chat_template': []}}, '', r'no chat template called default'),
        ({'tokenizer_config': {'chat_template': 3}}, '', r'no chat template called default'),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, files, setting, message):
    with pytest.raises(UserError, match=message) as refused:
        found(tmp_path, setting, **files)
    assert '\n' not in str(refused.value)


def test_a_template_that_is_not_text_is_refused(tmp_path):
    (tmp_path / 'chat_template.jinja').write_bytes(b'fine\xff')
    with pytest.raises(UserError, match=r'chat_template\.jinja is not UTF-8 text: offset 4'):
        found(tmp_path)


@pytest.mark.parametrize('source', ['a\n\n{% for %}', 'a\n\n{{ x | nonsense }}', '\n\n{% if 1 %}'])
def test_a_template_that_is_not_jinja_is_refused_with_its_line(source):
    with pytest.raises(UserError, match=r'^my\.jinja:3 is not a chat template: .*') as refused:
        chat_template.run(Template(source, 'my.jinja', NAMES), ONE, 'a.jsonl:7')
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
    ('source', 'reason'),
    [
        ("{{ raise_exception('Roles must alternate') }}", 'Roles must alternate'),
        ('{{ messages[3].content }}', 'has no element 3'),
        ('{{ 1 // 0 }}', 'by zero'),
        ('{{ "a" + 1 }}', 'concatenate'),
        (r'{{ "\ud800" }}', 'surrogates not allowed'),
        # Nothing but text is put together: no access to Python, no change of the messages, no time.
        ("{{ ''.__class__.__mro__ }}", 'unsafe'),
        ("{{ cycler.__init__.__globals__['os'] }}", 'unsafe'),
        ('{{ messages.append(1) }}', 'unsafe'),
        ('{{ range(999999999)|length }}', 'too big'),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
        ("{% include 'setup.cfg' %}", 'no loader'),
    ],
)
def test_a_template_that_raises_is_refused_with_the_place(source, reason):
    told = rf'^a\.jsonl:7 cannot be rendered by my\.jinja: .*{re.escape(reason)}'
    with pytest.raises(UserError, match=told) as refused:
        chat_template.run(Template(source, 'my.jinja', NAMES), ONE, 'a.jsonl:7')
    assert '\n' not in str(refused.value)


def test_blocks_of_generation_are_marked_and_others_are_not():
    plain, blocks = (Template(s, '', NAMES) for s in (chats.CHATML, chats.CHATML_BLOCKS))
    assert not chat_template.marks_answers(plain) and chat_template.marks_answers(blocks)
    marked = chat_template.run(blocks, chats.MESSAGES, '')
    inside = re.findall(f'{chat_template.START}(.*?){chat_template.STOP}', marked, re.DOTALL)
    assert inside == ['hi 😀 you<|im_end|>\n', 'the quick brown fox<|im_end|>\n']


def test_json_of_a_template_is_json_and_not_html():
    template = Template('{{ messages|tojson(indent=2) }}', '', NAMES)
    messages = [{'role': 'user', 'content': '<b> & "é"'}]
    assert chat_template.run(template, messages, '') == json.dumps(
        messages, indent=2, ensure_ascii=False
    )
