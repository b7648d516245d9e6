"""Tokenizers' files, which travel both ways with the chat template."""

import json
from typing import Any, NamedTuple

import tokenizers as library
from etils import epath

from helios_jax.convert.values import read_json
from helios_jax.data import special
from helios_jax.data import tokenizer as tokenizers
from helios_jax.data.tokenizer import GENERATION, ByteTokenizer
from helios_jax.errors import require

SPECS = ('tokenizer.json', 'tokenizer.model')  # what we read, in order of preference
SETTINGS = 'tokenizer_config.json'
OTHERS = (
    SETTINGS, 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
    'chat_template.jinja', 'chat_template.json', GENERATION,
)  # fmt: skip
LARGEST_BYTES = 2**28  # of a file


class Files(NamedTuple):
    spec: str  # the file that `data.tokenizer.load` reads
    tokenizer: tokenizers.Tokenizer
    contents: dict[str, bytes]  # by name, the spec among them


def read(directory: epath.Path, vocab_size: int, values: dict[str, Any]) -> Files:
    """Reads the tokenizer of a directory, and what transformers keeps beside it.

    Args:
      vocab_size: V of the model, which may have more rows than there are tokens.
      values: config.json, whose BOS and EOS must be those of the tokenizer's settings.
    Raises:
      UserError: no tokenizer, one of another vocabulary, or a file that is too large.
    """
    contents = {}
    for name in (*SPECS, *OTHERS):
        path = directory / name
        if not path.is_file():
            continue
        size = path.stat().length
        require(size <= LARGEST_BYTES, f'{path} has {size} bytes, more than {LARGEST_BYTES}.')
        contents[name] = path.read_bytes()
    spec = next((name for name in SPECS if name in contents), '')
    require(bool(spec), f'{directory} has no tokenizer: none of {", ".join(SPECS)} is there.')
    tokenizer = tokenizers.load(spec, directory)
    require(
        tokenizer.vocab_size <= vocab_size,
        f'{directory / spec} has {tokenizer.vocab_size} tokens, but the model has room for '
        f'{vocab_size}; put back the tokenizer that belongs to it.',
    )
    if spec == 'tokenizer.json' and SETTINGS in contents:
        _check_special(directory, contents[spec], values)
    place = f'{directory}: config.json'
    ends = special.end_ids(values.get('eos_token_id'), tokenizer.vocab_size, place)
    if GENERATION in contents:
        _ = tokenizer.end_ids  # or else they are refused
    elif ends:  # as transformers does where there is no such file
        contents[GENERATION] = json.dumps({'eos_token_id': list(ends)}).encode()
    return Files(spec, tokenizer, contents)


def _check_special(directory: epath.Path, content: bytes, values: dict[str, Any]) -> None:
    """Refuses a tokenizer whose BOS or EOS has another number than config.json says."""
    settings = read_json(directory / SETTINGS)
    vocabulary = library.Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    for role in ('bos', 'eos'):
        said, token = values.get(f'{role}_token_id'), settings.get(f'{role}_token')
        token = token.get('content') if isinstance(token, dict) else token
        numbers = said if isinstance(said, list) else [said]
        if not isinstance(token, str) or said is None:
            continue
        require(
            vocabulary.get(token) in numbers,
            f'{directory}: {role}_token={token!r:.40} of {SETTINGS} is number '
            f'{vocabulary.get(token)} of tokenizer.json, but {role}_token_id={said!r:.40} in '
            'config.json; put back the tokenizer that belongs to it.',
        )


def write(tokenizer: tokenizers.Tokenizer, kept: dict[str, bytes], directory: epath.Path) -> None:
    """Writes a tokenizer as transformers reads it.

    Args:
      kept: files that came with it, by name; without settings among them, they are made.
    """
    if isinstance(tokenizer, ByteTokenizer):
        (directory / 'tokenizer.json').write_text(_bytes())
    for name, content in kept.items():
        (directory / name).write_bytes(content)
    if SETTINGS not in kept:
        bos, eos = _names(directory, tokenizer)
        settings = {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos, 'eos_token': eos,
            'clean_up_tokenization_spaces': False,
        }  # fmt: skip
        (directory / SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=False))


def _names(directory: epath.Path, tokenizer: tokenizers.Tokenizer) -> tuple[str, str]:
    path = directory / 'tokenizer.json'
    if not path.exists():
        return '<s>', '</s>'  # SentencePiece's own
    made = library.Tokenizer.from_str(path.read_text())
    bos, eos = (made.id_to_token(number) for number in (tokenizer.bos_id, tokenizer.eos_id))
    assert bos and eos, 'the tokenizer has found them by these names'
    return bos, eos


def _bytes() -> str:
    """Writes our byte tokenizer as a tokenizer.json that encodes alike."""
    level = library.pre_tokenizers.ByteLevel
    letters = {value: letter for value, letter in enumerate(_letters())}
    special = {ByteTokenizer.bos_id: '<|bos|>', ByteTokenizer.eos_id: '<|eos|>'}
    vocabulary = {special.get(value, letter): value for value, letter in letters.items()}
    made = library.Tokenizer(library.models.BPE(vocabulary, []))
    made.pre_tokenizer = level(add_prefix_space=False, use_regex=False)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([*special.values()])
    return made.to_str()


def _letters() -> list[str]:
    """Letter of each byte in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(value) if value in shown else chr(next(others)) for value in range(256)]
