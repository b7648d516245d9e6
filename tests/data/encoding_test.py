import json
import pickle

import chats
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_jax.data import chat, encoding, tokenizer
from helios_jax.data.corpora import Document
from helios_jax.data.encoding import Piece

KINDS = ['bytes', 'byte level.json', 'sentences.model']
TEMPLATES = {
    'plain': '', 'chatml': chats.CHATML, 'blocks': chats.CHATML_BLOCKS, 'instruct': chats.INSTRUCT,
}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizers')
    chats.byte_level(folder / 'byte level.json')
    chats.sentences(folder / 'sentences.model')
    for name, source in TEMPLATES.items():
        (folder / f'{name}.jinja').write_text(source)
    return folder


@pytest.fixture(scope='module')
def load(folder):
    """Loads a tokenizer by the names of its kind and its template, once."""
    loaded: dict[tuple[str, str], tokenizer.Tokenizer] = {}

    def get(kind: str, template: str) -> tokenizer.Tokenizer:
        if (kind, template) not in loaded:
            spec = kind if kind == 'bytes' else str(folder / kind)
            setting = str(folder / f'{template}.jinja') if template != 'plain' else ''
            loaded[kind, template] = tokenizer.load(spec, chat_setting=setting)
        return loaded[kind, template]

    return get


def piece(tok: tokenizer.Tokenizer, messages: list[dict]) -> Piece:
    (made,) = encoding.streams(tok, [Document('', '', json.dumps(messages), 'a.jsonl:7')])
    return made


def learnt(tok: tokenizer.Tokenizer, made: Piece) -> list[str]:
    """The text of each run of targets."""
    edges = np.flatnonzero(np.diff(made.is_target.astype(int), prepend=0, append=0)).tolist()
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tok.decode(made.tokens[first:last].tolist()) for first, last in runs]


@pytest.mark.parametrize('template', TEMPLATES)
@pytest.mark.parametrize('kind', KINDS)
def test_answers_and_nothing_else_are_targets(load, kind, template):
    tok = load(kind, template)
    made = piece(tok, chats.MESSAGES)
    end = {'plain': '', 'instruct': ''}.get(template, '<|im_end|>\n')
    assert [text.strip(' ') for text in learnt(tok, made)] == [
        f'hi 😀 you{end}', f'the quick brown fox{end}'
    ]  # fmt: skip
    # EOS ends the document, once, and is learnt; BOS is the rows'.
    assert made.tokens[-1] == tok.eos_id and made.is_target[-1]
    assert tok.bos_id not in made.tokens
    assert (made.tokens == tok.eos_id).sum() == {'plain': 5, 'instruct': 2}.get(template, 1)


@pytest.mark.parametrize('kind', KINDS)
def test_bytes_are_those_of_answers(load, kind):
    made = piece(load(kind, 'plain'), chats.MESSAGES)
    spoken = [m['content'] for m in chats.MESSAGES if m['role'] == 'assistant']
    assert made.num_bytes.sum() == len(''.join(spoken).encode())
    assert not made.num_bytes[~made.is_target].any() and not made.lost_bytes.any()
    document = Document('', '', json.dumps(chats.MESSAGES), '')
    scored = list(encoding.scored(load(kind, 'plain'), document))
    assert [text for text, _ in scored] == [encoded.kept for _, encoded in scored] == spoken


def test_special_tokens_of_an_answer_have_no_bytes_and_are_learnt(load):
    tok = load('byte level.json', 'blocks')
    made = piece(tok, chats.MESSAGES)
    ends = (made.tokens == tok.special_ids['<|im_end|>']) & made.is_target
    assert ends.sum() == 2 and not made.num_bytes[ends].any()


def test_tokens_are_those_of_the_whole_conversation(load):
    """An opened answer, encoded alone, is how the tokens of the conversation begin."""
    tok = load('byte level.json', 'chatml')
    made = piece(tok, chats.MESSAGES)
    opened = chat.render(tok, chats.MESSAGES[:4], '', add_generation_prompt=True)
    ids = encoding.encode(tok, opened).ids
    assert made.tokens[: len(ids)].tolist() == ids and made.is_target[len(ids)]


def test_a_conversation_that_ends_with_a_question_has_no_target_there(load):
    made = piece(load('byte level.json', 'chatml'), chats.MESSAGES[:4])
    assert made.tokens[-1] == 1 and not made.is_target[-1]
    assert learnt(load('byte level.json', 'chatml'), made) == ['hi 😀 you<|im_end|>\n']


def test_white_space_behind_a_templates_last_eos_goes(folder, load):
    (folder / 'spaced.jinja').write_text(chats.CHATML.replace('<|im_end|>', '<|eos|>'))
    made = piece(load('bytes', 'spaced'), chats.MESSAGES)
    assert (made.tokens == 0xFF).sum() == len(chats.MESSAGES)
    assert made.tokens[-1] == 0xFF != made.tokens[-2] and made.is_target[-1]


def test_a_token_of_question_and_answer_is_no_target(folder, load):
    """' the' is one token: generation, which reads the space, would never give it."""
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    (folder / 'space.jinja').write_text(
        source + '{% if add_generation_prompt %}{{ "assistant: " }}{% endif %}'
    )
    tok = load('byte level.json', 'space')
    made = piece(tok, [chats.MESSAGES[1], chats.MESSAGES[4]])
    assert learnt(tok, made) == [' quick brown fox<|im_end|>']
    assert made.num_bytes.sum() == len(' quick brown fox') and not made.lost_bytes.any()


@pytest.mark.parametrize('first', ['ü', '😀x', '\u0301'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_character_of_several_tokens_is_learnt_whole(load, kind, first):
    tok = load(kind, 'plain')
    made = piece(tok, [chats.MESSAGES[1], {'role': 'assistant', 'content': first}])
    assert [text.strip() for text in learnt(tok, made)] == [first]
    assert made.num_bytes.sum() == len(first.encode())


FORGED = [*chats.SPECIALS, '<s>', '</s>', '<<|eos|>', '<|im_<|im_end|>end|>', '<|im_end', '|>', 'x']


@pytest.mark.parametrize('template', ['plain', 'chatml', 'blocks'])
@pytest.mark.parametrize('kind', KINDS)
@given(parts=st.lists(st.sampled_from(FORGED), max_size=5))
@settings(max_examples=20, deadline=None)
def test_no_message_forges_a_special_token(load, kind, template, parts):
    tok, text = load(kind, template), ''.join(parts)
    forged = [{'role': m['role'], 'content': f'a{text}b'} for m in chats.MESSAGES]
    harmless = [{'role': m['role'], 'content': 'ab'} for m in chats.MESSAGES]
    special = list(tok.special_ids.values())
    specials = [ids[np.isin(ids, special)] for ids in (
        piece(tok, forged).tokens, piece(tok, harmless).tokens
    )]  # fmt: skip
    assert specials[0].tolist() == specials[1].tolist()
    if kind != 'sentences.model':  # which puts a space where a part begins
        conversation = chat.render(tok, forged, '')
        made = piece(tok, forged)
        assert f'a{text}b' in conversation.text
        assert f'a{text}b' in tok.decode(made.tokens.tolist())
        end = '<|im_end|>\n' if template != 'plain' else ''
        assert learnt(tok, made) == [f'a{text}b{end}'] * 2


@pytest.mark.parametrize('kind', KINDS)
def test_a_tokenizer_of_another_process_encodes_alike(folder, kind):
    tok = tokenizer.load(kind if kind == 'bytes' else str(folder / kind))
    again = pickle.loads(pickle.dumps(tok))
    text = 'a<|bos|></s><|eos|><|im_end|>'
    assert again.encode(text) == tok.encode(text)
    assert not {tok.bos_id, tok.eos_id} & set(again.encode(text))
    for one, two in zip(piece(tok, chats.MESSAGES), piece(again, chats.MESSAGES), strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize('template', ['chatml', 'blocks', 'instruct'])
def test_tokens_and_masks_are_those_of_transformers(folder, load, template):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / 'byte level.json'), bos_token='<|bos|>', eos_token='<|eos|>'
    )
    theirs.chat_template = TEMPLATES[template]
    found = theirs.apply_chat_template(
        chats.MESSAGES, return_dict=True, return_assistant_tokens_mask=template == 'blocks'
    )
    tok = load('byte level.json', template)
    ids, mask = found['input_ids'], found.get('assistant_masks')
    ours = piece(tok, chats.MESSAGES)
    starts_with_bos = ids[0] == tok.bos_id
    assert starts_with_bos == (template == 'instruct')
    ended = ids if ids[-1] == tok.eos_id else [*ids, tok.eos_id]
    assert ours.tokens.tolist() == ended[starts_with_bos:]
    if mask:
        assert ours.is_target[:-1].tolist() == [bool(value) for value in mask]
    opened = theirs.apply_chat_template(
        chats.MESSAGES[:2], add_generation_prompt=True, return_dict=True
    )
    conversation = chat.render(tok, chats.MESSAGES[:2], '', add_generation_prompt=True)
    assert encoding.encode(tok, conversation).ids == opened['input_ids']


def test_a_folder_of_transformers_is_read_as_it_is(tmp_path):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=chats.byte_level(tmp_path / 'from.json'), eos_token='<|im_end|>'
    )
    theirs.chat_template = chats.CHATML
    theirs.save_pretrained(tmp_path / 'saved')
    tok = tokenizer.load(str(epath.Path(tmp_path) / 'saved' / 'tokenizer.json'))
    assert tok.chat_template.source == chats.CHATML
    assert tok.chat_template.tokens['eos_token'] == '<|im_end|>'
    assert learnt(tok, piece(tok, chats.MESSAGES))[0] == 'hi 😀 you<|im_end|>\n'
