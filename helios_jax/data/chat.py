"""Renders conversations as text, and finds the answers in it.

Text of a message stays text: where it holds the name of a special token, encoding begins anew
within that name, so that no message can end its turn or begin another's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from helios_jax.data import chat_template
from helios_jax.data.chat_template import START, STOP, Template
from helios_jax.errors import require

if TYPE_CHECKING:
    from helios_jax.data.tokenizer import Tokenizer

ANSWERER = 'assistant'
CUT = '\ufdd0'  # as START and STOP
MARKS = re.compile(f'[{CUT}{START}{STOP}]')


class Conversation(NamedTuple):
    """A conversation as text."""

    text: str
    answers: list[tuple[int, int]]  # start and end of each, in characters
    cuts: list[int]  # where encoding is to begin anew, so that a message's text stays text


def stored(record: Mapping[str, Any], place: str) -> str:
    """Returns the messages of a record as JSON, once they can be learnt from.

    Raises:
      UserError: messages of another shape than [{"role": "user", "content": "…"}, …], or none of
        the assistant's.
    """
    messages = record['messages']
    require(
        isinstance(messages, list) and all(isinstance(message, dict) for message in messages),
        f'{place}: "messages" must be a list of objects with the strings "role" and "content".',
    )
    for number, message in enumerate(messages, 1):
        for name in ('role', 'content'):
            require(
                isinstance(message.get(name), str),
                f'{place}: "{name}" of message {number} is {message.get(name)!r:.80}; it must be a '
                'string.',
            )
    require(
        any(message['role'] == ANSWERER for message in messages),
        f'{place} has no message of the role {ANSWERER!r}, and so nothing to learn.',
    )
    require(not record.get('tools'), f'{place} has "tools", which are not rendered; take them out.')
    text = json.dumps(messages, ensure_ascii=False)
    require(
        not MARKS.search(text),
        f'{place} has one of the characters U+FDD0 to U+FDD2, which Unicode keeps out of text.',
    )
    return text


def render(
    tokenizer: 'Tokenizer',
    messages: Sequence[Mapping[str, Any]],
    place: str,
    *,
    add_generation_prompt: bool = False,
) -> Conversation:
    """Renders messages by the tokenizer's chat template; `training` finds the answers as well.

    Args:
      place: where they come from, for messages of errors.
      add_generation_prompt: opens the answer that is to be generated.
    Raises:
      UserError: a template that is not Jinja, or raises an error.
    """
    text = chat_template.run(
        tokenizer.chat_template, cut(messages, tokenizer), place, add_generation_prompt
    )
    return _unmarked(text)


def training(
    tokenizer: 'Tokenizer', messages: Sequence[Mapping[str, Any]], place: str
) -> Conversation:
    """Renders messages, and finds the assistant's answers with what ends their turns.

    They are what stands in `{% generation %}` blocks. In a template without these, an answer is
    what follows the messages before it, rendered with add_generation_prompt.

    Raises:
      UserError: as `render` says; or it cannot be said what the answers are.
    """
    template = tokenizer.chat_template
    messages = cut(messages, tokenizer)
    whole = chat_template.run(template, messages, place)
    if not chat_template.marks_answers(template):
        return _unmarked(_marked(template, messages, place, whole))
    conversation = _unmarked(whole)
    blocks_are_whole = whole.count(START) == whole.count(STOP)
    require(
        blocks_are_whole and any(start < end for start, end in conversation.answers),
        f'{place}: {template.path} marks no whole answer in this conversation; put every one into '
        '{% generation %} … {% endgeneration %}.',
    )
    return conversation


def _marked(
    template: Template, messages: Sequence[Mapping[str, Any]], place: str, whole: str
) -> str:
    """Puts marks around the answers of a template that has none."""
    marked, done = '', 0
    for index in [i for i, message in enumerate(messages) if message['role'] == ANSWERER]:
        before = chat_template.run(template, messages[:index], place, add_generation_prompt=True)
        after = chat_template.run(template, messages[: index + 1], place)
        holds = after.startswith(before) and whole.startswith(after) and done <= len(before)
        require(
            holds,
            f'{place}: what {template.path} renders up to message {index + 1} is not how the '
            'conversation begins, so that its answer cannot be told; put {% generation %} and '
            '{% endgeneration %} around answers in the template, or set data.chat_template.',
        )
        marked += whole[done : len(before)] + START + whole[len(before) : len(after)] + STOP
        done = len(after)
    return marked + whole[done:]


def _unmarked(marked: str) -> Conversation:
    """Takes the marks out of a rendered conversation."""
    places: dict[str, list[int]] = {CUT: [], START: [], STOP: []}
    for number, match in enumerate(MARKS.finditer(marked)):
        places[match[0]].append(match.start() - number)
    answers = list(zip(places[START], places[STOP], strict=False))
    return Conversation(MARKS.sub('', marked), answers, places[CUT])


def cut(value: Any, tokenizer: 'Tokenizer') -> Any:
    """Cuts each name of a special token that the messages hold, so that it stays text."""
    if isinstance(value, str):
        return tokenizer.special_starts.sub(rf'\g<0>{CUT}', value)
    if isinstance(value, list):
        return [cut(item, tokenizer) for item in value]
    if isinstance(value, dict):
        return {cut(name, tokenizer): cut(item, tokenizer) for name, item in value.items()}
    return value
