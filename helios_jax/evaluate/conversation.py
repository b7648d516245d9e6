"""Conversations as prompts: rendered by the tokenizer's chat template, up to the answer."""

from collections.abc import Sequence
from typing import NamedTuple

from helios_jax.data import chat, encoding
from helios_jax.data.tokenizer import Tokenizer

PLACE = 'the conversation'  # in messages of errors


class Chat(NamedTuple):
    """Settings by which a prompt becomes a conversation."""

    system: str = ''  # the message in front of it; '' is none


def opened(tokenizer: Tokenizer, prompt: str, given: Chat) -> list[int]:
    """Encodes a conversation in which the user has said `prompt`, BOS first.

    Raises:
      UserError: the chat template does not render it.
    """
    messages = [{'role': 'system', 'content': given.system}] if given.system else []
    messages.append({'role': 'user', 'content': prompt})
    rendered = chat.render(tokenizer, messages, PLACE, add_generation_prompt=True)
    ids = encoding.encode(tokenizer, rendered).ids
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def turn_ends(tokenizer: Tokenizer) -> Sequence[int]:
    """Finds the special token that the chat template writes behind an answer, if it writes one.

    Raises:
      UserError: the chat template does not render a question and its answer.
    """
    said = [{'role': 'user', 'content': 'a'}, {'role': chat.ANSWERER, 'content': 'b'}]
    rendered = chat.training(tokenizer, said, PLACE)
    start, end = rendered.answers[-1]
    ids = tokenizer.encode_rendered(rendered.text[start:end]).ids
    special = set(tokenizer.special_ids.values())
    return [index for index in ids if index in special][:1]
