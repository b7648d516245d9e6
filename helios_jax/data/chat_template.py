"""Finds chat templates and runs them in a sandbox.

A template is Jinja text, such as tokenizers of the Hugging Face Hub bring along. In the sandbox of
jinja2 it sees the messages and the names of special tokens, and can only put text together. It has
no clock: a conversation always gives the same text.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from etils import epath

from helios_jax import paths
from helios_jax.data import records
from helios_jax.errors import UserError, require

FILE, CONFIG = 'chat_template.jinja', 'tokenizer_config.json'  # beside the tokenizer, in this order
# Turns of `<|role|>`, a line feed, the content and EOS.
PLAIN = (
    r"{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BUILT_IN = 'the built-in chat template'  # the path of `PLAIN`
# Marks around what stands in a block `generation`. Unicode keeps them out of text.
START, STOP = '\ufdd1', '\ufdd2'


class Template(NamedTuple):
    """A chat template and the names of special tokens that it may write."""

    source: str
    path: str  # where it was found, for messages
    tokens: Mapping[str, str]  # such as bos_token and eos_token

    @property
    def fingerprint(self) -> str:
        return records.digest(self.source, self.tokens)

    def config(self) -> str:
        """Content of a tokenizer_config.json in which `find` finds this template."""
        return json.dumps({**self.tokens, 'chat_template': self.source}, indent=1)


def find(folder: epath.Path | None, setting: str, tokens: Mapping[str, str]) -> Template:
    """Finds `data.chat_template`, the one beside the tokenizer, or the built-in one.

    Args:
      folder: the tokenizer's; None if it has none.
      setting: `data.chat_template`; '' takes the tokenizer's own.
      tokens: names of the tokenizer's special tokens, where its tokenizer_config.json has none.
    Raises:
      UserError: no such file, or one that cannot be read.
    """
    paths.check('data.chat_template', setting)
    config = _config(folder / CONFIG) if folder and (folder / CONFIG).is_file() else {}
    named = {name: value.get('content') if isinstance(value, dict) else value
             for name, value in config.items() if name.endswith('_token')}  # fmt: skip
    tokens = {**tokens, **{name: value for name, value in named.items() if isinstance(value, str)}}
    if setting:
        path = epath.Path(setting).expanduser()
        require(path.is_file(), f'data.chat_template={setting!r}: no such file.')
        return Template(_text(path), str(path), tokens)
    if folder and (folder / FILE).is_file():
        return Template(_text(folder / FILE), str(folder / FILE), tokens)
    own = config.get('chat_template')
    if folder and own is not None:
        if isinstance(own, list):  # several, each with its name
            own = next((t['template'] for t in own if t['name'] == 'default'), None)
        if not isinstance(own, str):
            raise UserError(
                f'{folder / CONFIG} has no chat template called default; set data.chat_template.'
            )
        return Template(own, str(folder / CONFIG), tokens)
    return Template(PLAIN, BUILT_IN, tokens)


def _text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text: offset {error.start}.') from None


def _config(path: epath.Path) -> dict[str, Any]:
    try:
        config = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON: {error}.') from None
    require(isinstance(config, dict), f'{path} must hold a JSON object.')
    return config


def marks_answers(template: Template) -> bool:
    """True if the template has blocks `generation`.

    Raises:
      UserError: a template that is not Jinja, naming its line.
    """
    environment: Any = _compiled(template.source, template.path).environment
    return environment.marks_answers


def run(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    place: str,
    add_generation_prompt: bool = False,
) -> str:
    """Renders messages; blocks `generation` stand between START and STOP.

    Args:
      place: where the messages come from, for errors.
    Raises:
      UserError: a template that is not Jinja, naming its line, or one that raises an error.
    """
    compiled = _compiled(template.source, template.path)
    try:
        text = compiled.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **template.tokens,
        )
        text.encode()
    except Exception as error:  # a template can raise whatever Python does
        reason = (str(error) or repr(error)).partition('\n')[0].rstrip('.')
        raise UserError(f'{place} cannot be rendered by {template.path}: {reason}.') from None
    return text


@functools.lru_cache
def _compiled(source: str, path: str) -> jinja2.Template:
    """Compiles a template; its environment's `marks_answers` says if it has blocks `generation`."""
    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.marks_answers = False
    environment.filters['tojson'] = _to_json
    environment.globals['raise_exception'] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f'{path}:{error.lineno} is not a chat template: {error.message}; mend it, or set '
            'data.chat_template to another.'
        ) from None


class _Generation(jinja2.ext.Extension):
    """Marks what `{% generation %}` and `{% endgeneration %}` enclose, as transformers does."""

    tags = {'generation'}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        parser.environment.marks_answers = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f'{START}{caller()}{STOP}'


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces jinja2's filter, which escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
