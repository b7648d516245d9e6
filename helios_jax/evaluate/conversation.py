"""Conversations as prompts: rendered by the tokenizer's chat template, up to the answer."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from helios_jax.data import chat, chat_template
from helios_jax.data.chat import CUT
from helios_jax.data.tokenizer import Tokenizer
from helios_jax.errors import require

PLACE = 'the conversation'  # in messages of errors
# Behind the message that is to go on; the space tells whether the template strips messages.
END, SPACE = '\ufdd3', ' '


class Chat(NamedTuple):
    """Settings by which a prompt becomes a conversation."""

    system: str = ''  # the message in front of it; '' is none


def check(tokenizer: Tokenizer, given: Chat) -> None:
    """Refuses a tokenizer without a chat template, and a template that cannot render a chat.

    Raises:
      UserError: there is none but the built-in one; or it fails, with or without an answer.
    """
    require(
        tokenizer.chat_template.path != chat_template.BUILT_IN,
        f'the checkpoint carries no chat template; put the {chat_template.FILE} of the model into '
        'the folder tokenizer of its checkpoints, or do without apply_chat_template.',
    )
    opened(tokenizer, 'a', given)
    turn_ends(tokenizer)


def opened(tokenizer: Tokenizer, prompt: str, given: Chat) -> list[int]:
    """Encodes a conversation in which the user has said `prompt`, BOS first.

    Raises:
      UserError: the chat template does not render it.
    """
    messages = [{'role': 'system', 'content': given.system}] if given.system else []
    messages.append({'role': 'user', 'content': prompt})
    return encoded(tokenizer, rendered(tokenizer, messages))


def rendered(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, goes_on: bool = False
) -> str:
    """Renders messages up to where the answer begins, as a text for `encoded`.

    Args:
      goes_on: the last message is the beginning of the answer, and its turn is left open.
    Raises:
      UserError: the chat template does not render them, or leaves out the answer's beginning.
    """
    if goes_on:
        *before, last = messages
        messages = [*before, {**last, 'content': last['content'] + END + SPACE}]
    found = chat.render(tokenizer, messages, PLACE, add_generation_prompt=not goes_on)
    edges = itertools.pairwise([0, *found.cuts, len(found.text)])
    text = CUT.join(found.text[start:end] for start, end in edges)
    if not goes_on:
        return text
    path = tokenizer.chat_template.path
    require(END in text, f'{path} leaves out a message that is to go on; mend it.')
    text, _, rest = text.rpartition(END)
    return text if rest.startswith(SPACE) else text.rstrip()


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes what `rendered` gives, BOS first; encoding begins anew where it has a `CUT`."""
    ids = [token for part in text.split(CUT) for token in tokenizer.encode_rendered(part).ids]
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def turn_ends(tokenizer: Tokenizer) -> Sequence[int]:
    """Finds the special token that the chat template writes behind an answer, if it writes one.

    Raises:
      UserError: the chat template does not render a question and its answer.
    """
    said = [{'role': 'user', 'content': 'a'}, {'role': chat.ANSWERER, 'content': 'b'}]
    found = chat.training(tokenizer, said, PLACE)
    start, end = found.answers[-1]
    ids = tokenizer.encode_rendered(found.text[start:end]).ids
    special = set(tokenizer.special_ids.values())
    return [index for index in ids if index in special][:1]
