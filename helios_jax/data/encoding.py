"""Turns documents into tokens, with the bytes of text that each stands for and which are targets.

Of a conversation the tokens of answers are targets: those that lie in an answer as a whole.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt32

from helios_jax.data import chat, lossy
from helios_jax.data.chat import Conversation
from helios_jax.data.corpora import Document
from helios_jax.data.lossy import Encoded
from helios_jax.data.special import Spanned
from helios_jax.data.tokenizer import Tokenizer

ENCODED_AT_ONCE = 256  # documents


class Piece(NamedTuple):
    """Tokens that stay together."""

    tokens: UInt32[np.ndarray, 'tokens']
    num_bytes: UInt32[np.ndarray, 'tokens']  # of text given back; 0 for special tokens and prompts
    lost_bytes: UInt32[np.ndarray, 'tokens']  # of text that decoding does not give back
    is_target: Bool[np.ndarray, 'tokens']  # False for prompts


def streams(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[Piece]:
    """Yields each document's tokens and EOS, uncut, without BOS.

    Raises:
      UserError: a conversation that the chat template does not render.
    """
    remaining = iter(documents)
    while chunk := list(itertools.islice(remaining, ENCODED_AT_ONCE)):
        prompts = tokenizer.encode_batch([d.prompt for d in chunk])
        texts = tokenizer.encode_with_bytes([d.text for d in chunk])
        for document, prompt_ids, text in zip(chunk, prompts, texts, strict=True):
            if document.messages:
                yield _conversation(tokenizer, document)
            else:
                yield _plain(tokenizer, prompt_ids, document.text, text)


def scored(tokenizer: Tokenizer, document: Document) -> Iterator[tuple[str, Encoded]]:
    """Yields the texts of a document that are targets, and as what they are encoded."""
    if not document.messages:
        yield document.text, tokenizer.encode_with_bytes([document.text])[0]
        return
    conversation = _training(tokenizer, document)
    encoded = encode(tokenizer, conversation)
    for _, text, found in _runs(tokenizer, conversation, encoded):
        yield text, found


def encode(tokenizer: Tokenizer, conversation: Conversation) -> Spanned:
    """Encodes a rendered conversation, with the special tokens that its template names."""
    text, ids, spans = conversation.text, list[int](), list[tuple[int, int]]()
    for start, end in itertools.pairwise([0, *conversation.cuts, len(text)]):
        own = tokenizer.encode_rendered(text[start:end])
        ids += own.ids
        spans += [(first + start, last + start) for first, last in own.spans]
    return Spanned(ids, spans)


def _plain(tokenizer: Tokenizer, prompt_ids: list[int], text: str, encoded: Encoded) -> Piece:
    prompt = np.asarray(prompt_ids, np.uint32)
    eos = np.array([tokenizer.eos_id], np.uint32)
    tokens = np.concatenate([prompt, encoded.ids, eos])
    num_bytes = np.concatenate([np.zeros_like(prompt), encoded.num_bytes, np.zeros_like(eos)])
    lost_bytes = np.zeros_like(tokens)
    lost_bytes[-1] = len(text.encode()) - num_bytes.sum(dtype=np.int64)
    return Piece(tokens, num_bytes, lost_bytes, np.arange(len(tokens)) >= len(prompt))


def _training(tokenizer: Tokenizer, document: Document) -> Conversation:
    return chat.training(tokenizer, json.loads(document.messages), document.place)


def _conversation(tokenizer: Tokenizer, document: Document) -> Piece:
    conversation = _training(tokenizer, document)
    encoded = encode(tokenizer, conversation)
    num_bytes = np.zeros(len(encoded.ids), np.uint32)
    lost_bytes = np.zeros_like(num_bytes)
    for where, text, found in _runs(tokenizer, conversation, encoded):
        num_bytes[where] = found.num_bytes
        lost_bytes[where.start] = len(text.encode()) - found.num_bytes.sum(dtype=np.int64)
    is_target = _in_answers(conversation, encoded)
    whole = Piece(np.asarray(encoded.ids, np.uint32), num_bytes, lost_bytes, is_target)
    return _ended(tokenizer, conversation, encoded, whole)


def _ended(
    tokenizer: Tokenizer, conversation: Conversation, encoded: Spanned, whole: Piece
) -> Piece:
    """Leaves out a BOS that the template writes first, and ends in one EOS, the template's or ours.

    White space behind the template's last EOS goes. Ours is a target if an answer comes last.
    """
    first = int(encoded.ids[:1] == [tokenizer.bos_id])
    ends = [at for at, index in enumerate(encoded.ids) if index == tokenizer.eos_id and at >= first]
    if ends and not conversation.text[encoded.spans[ends[-1]][1] :].strip():
        return Piece(*(values[first : ends[-1] + 1] for values in whole))
    answered = conversation.answers[-1][1] >= len(conversation.text.rstrip())
    eos = (tokenizer.eos_id, 0, 0, answered)
    return Piece(*(np.append(v[first:], v.dtype.type(e)) for v, e in zip(whole, eos, strict=True)))


def _in_answers(conversation: Conversation, encoded: Spanned) -> Bool[np.ndarray, 'tokens']:
    """True for tokens that lie in an answer as a whole."""
    starts, ends = np.asarray(encoded.spans, np.int64).reshape(-1, 2).T
    # SentencePiece gives a character's bytes to the last of its tokens: the others go with it.
    for at in np.flatnonzero(starts[:-1] == ends[:-1])[::-1]:
        ends[at] = ends[at + 1]
    inside = np.zeros(len(encoded.ids), bool)
    for start, end in conversation.answers:
        inside |= (start <= starts) & (starts < end) & (start < ends) & (ends <= end)
    return inside


def _runs(
    tokenizer: Tokenizer, conversation: Conversation, encoded: Spanned
) -> Iterator[tuple[slice, str, Encoded]]:
    """Yields runs of targets that are text: which tokens, their text, and what comes back of it."""
    special = np.isin(encoded.ids, list(tokenizer.special_ids.values()))
    is_text = _in_answers(conversation, encoded) & ~special
    edges = np.flatnonzero(np.diff(is_text.astype(np.int8), prepend=0, append=0)).tolist()
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        ids, spans = encoded.ids[first:last], encoded.spans[first:last]
        begin = spans[0][0]
        text = conversation.text[begin : max(end for _, end in spans)]
        own = [(start - begin, end - begin) for start, end in spans]
        before = encoded.ids[max(first - 1, 0) : first]
        returned = lossy.decode_behind(tokenizer, before, ids)
        if lossy.keeps_all(tokenizer, text, ids, returned):
            num_bytes = lossy.bytes_per_token(lossy.byte_ends(own, text), text)
            found = Encoded(np.asarray(ids, np.uint32), num_bytes, text)
        else:
            found = lossy.partly(tokenizer, text, ids, own)
        yield slice(first, last), text, found
