"""Measures a model on rows longer than its trained length, by method of stretching positions.

It measures the perplexity of sliding windows, bits per byte by position (sliding.py), passkeys by
depth (passkey.py) and tasks of RULER (ruler.py).
"""

import dataclasses
import functools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from helios_jax import config, display
from helios_jax.data import corpora
from helios_jax.data.lossy import Encoded
from helios_jax.data.tokenizer import Tokenizer
from helios_jax.errors import UserError, require
from helios_jax.evaluate import responses
from helios_jax.evaluate.generate import continued
from helios_jax.evaluate.held_out import split
from helios_jax.evaluate.length_settings import METHODS, Lengths
from helios_jax.evaluate.passkey import passkey
from helios_jax.evaluate.prompts import Prompt, Puzzle, accuracy, fit
from helios_jax.evaluate.ruler import TASKS
from helios_jax.evaluate.scores import shapes
from helios_jax.evaluate.sliding import perplexity
from helios_jax.model.transformer import Transformer
from helios_jax.restoring import Restored, mesh_of

log = logging.getLogger(__name__)

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of passkeys

# Continues prompts with a model, so many tokens at a time.
Answerer = Callable[[Restored, Sequence[Prompt], int], list[str]]


def measure(
    restored: Restored,
    wanted: Lengths,
    *,
    trained_on: Mapping[str, Any] | None = None,
    answer: Answerer | None = None,
    output: epath.PathLike = '',
) -> dict[str, Any]:
    """Measures every method at every length; one that was stopped goes on where `output` has it.

    Args:
      trained_on: as `held_out.held_out`.
      output: directory that keeps every row's score, and every answer, as they come; '' keeps none.
      answer: continues prompts; greedy decoding by default.
    Returns:
      The settings, `trained_length`, the number of `documents`, and `rows`, one for each method and
      length: what `sliding.perplexity` returns; `passkey` by depth and `ruler` by task, accuracies
      from 0 to 1. Tasks that need a longer prompt are left out.
    Raises:
      UserError: no document is as long as the longest row; as `held_out.held_out`; `output` has
        answers of another model.
    """
    texts = long_documents(restored.config.data, restored.tokenizer, wanted, trained_on)
    path = epath.Path(output).expanduser() / responses.FILE if output else None
    known = responses.Responses(path, responses.identity(restored) if path else '')
    answer = answer or functools.partial(greedy, known=known)
    trained = restored.model.model.rope.trained_length
    batch_tokens = wanted.batch_rows * restored.config.data.row_length
    prompts = {length: prompts_of(restored, wanted, length) for length in wanted.lengths}
    rows = []
    total = len(wanted.methods) * len(wanted.lengths)
    with display.phase('Measuring lengths', total, 'rows') as advance:
        for method in wanted.methods:
            for length in wanted.lengths:
                model = stretched(restored, method, length)
                row = {'method': method, 'length': length, 'factor': max(1.0, length / trained)}
                row |= perplexity(model, texts, length, wanted.stride, batch_tokens, known)
                for kind, tasks in prompts[length].items():
                    row[kind] = {
                        name: accuracy(some, answer(model, some, batch_tokens))
                        for name, some in tasks.items()
                    }
                rows.append(row)
                advance(1)
    settings = dataclasses.asdict(wanted) | {'documents': len(texts), 'trained_length': trained}
    return settings | {'rows': rows}


def stretched(restored: Restored, method: str, length: int) -> Restored:
    """Returns the model with the positions of one of METHODS, for rows of `length` tokens."""
    trained = restored.model.model.rope.trained_length
    rope = METHODS[method](max(1.0, length / trained))
    rope |= {'attention_factor': 0.0}  # the m of another factor is wrong
    changes: dict[str, Any] = {f'model.rope.{name}': value for name, value in rope.items()}
    # Rows that static YaRN was trained on may be longer: no other scaling is to be trained on them.
    changes['data.row_length'] = min(restored.config.data.row_length, trained)
    cfg = config.replace(restored.config, changes)
    return restored._replace(model=Transformer(cfg.model), config=cfg)


def long_documents(
    data: config.Data,
    tokenizer: Tokenizer,
    wanted: Lengths,
    trained_on: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """Encodes the first documents that are as long as the longest row, and cuts them to it.

    Args:
      data: of the run; `wanted.text` is read in the place of its held-out split, if there is one.
    Raises:
      UserError: as `measure`.
    """
    longest = max(wanted.lengths) - 1  # BOS is the other token
    where = f'--text={wanted.text}' if wanted.text else f'the held-out split of {data.corpus}'
    found: list[Encoded] = []
    most = 0
    own = held_out(data, tokenizer, trained_on)
    for text in corpora.texts(wanted.text) if wanted.text else own:
        if len(text.encode()) < longest:
            continue
        (encoded,) = tokenizer.encode_with_bytes([text])
        require(
            encoded.kept == text or wanted.allow_lossy_tokenizer or data.allow_lossy_tokenizer,
            f'the tokenizer loses some of {where}, whose bits per byte would then count only what '
            'it keeps; name another text, or add --allow_lossy_tokenizer.',
        )
        most = max(most, len(encoded.ids))
        if len(encoded.ids) >= longest:
            cut = encoded.ids[:longest], encoded.num_bytes[:longest]
            found.append(Encoded(*cut, encoded.kept))
        if len(found) == wanted.documents:
            break
    require(
        len(found) > 0,
        f'no document of {where} has the {longest + 1} tokens of the longest row'
        f'{f" (its longest: {most})" if most else ""}; ask for shorter rows, or name a text with '
        'longer documents.',
    )
    return found


def held_out(
    data: config.Data, tokenizer: Tokenizer, trained_on: Mapping[str, Any] | None
) -> Iterator[str]:
    """Yields the documents that the run held out, prompts joined to the text."""
    for rows in split(data, tokenizer, trained_on).corpora:
        for shard in rows.documents.shards():
            for document in shard:
                yield document.prompt + document.text


def prompts_of(
    restored: Restored, wanted: Lengths, length: int
) -> dict[str, dict[str, list[Prompt]]]:
    """Makes the prompts of one length: `passkey` by depth and `ruler` by task, each `trials` long.

    They are the same for every method, and for one seed the same every time.
    """
    made: dict[str, dict[str, Callable[[random.Random], Puzzle]]] = {
        'passkey': {str(depth): lambda rng, depth=depth: passkey(rng, depth) for depth in DEPTHS},
        'ruler': {**TASKS},
    }
    found: dict[str, dict[str, list[Prompt]]] = {}
    too_long: dict[str, None] = {}
    for kind, tasks in made.items():
        found[kind] = {}
        for name, task in tasks.items():
            seeds = [f'{name} {length} {wanted.seed} {trial}' for trial in range(wanted.trials)]
            try:
                prompts = [
                    fit(task(random.Random(seed)), restored.tokenizer, length) for seed in seeds
                ]
            except UserError:
                too_long[kind if kind == 'passkey' else name] = None
                continue
            if prompts:
                found[kind][name] = prompts
    if too_long:
        log.warning('%d tokens are too few for %s: left out.', length, ', '.join(too_long))
    return found


def greedy(
    restored: Restored,
    prompts: Sequence[Prompt],
    batch_tokens: int,
    known: responses.Responses | None = None,
) -> list[str]:
    """Continues prompts with their likeliest tokens.

    Args:
      known: texts that are there already, and where new ones go.
    """
    rope = dataclasses.asdict(restored.model.model.rope)
    keys = [responses.digest('text', rope, prompt.tokens, prompt.room) for prompt in prompts]
    known = responses.Responses(None, model='') if known is None else known
    lengths = [len(prompt.tokens) + prompt.room for prompt in prompts]
    for shape in shapes(lengths, mesh_of(restored.variables), batch_tokens):
        if all(keys[i] in known for i in shape.indices):
            continue
        some = [prompts[i] for i in shape.indices]
        filled = [*some, *[some[-1]] * (shape.num_rows - len(some))]
        room = max(prompt.room for prompt in some)
        made = continued(restored, [p.tokens for p in filled], max_tokens=room, temperature=0.0)
        known.add({keys[i]: text for i, text in zip(shape.indices, made, strict=False)})
    return [known[key] for key in keys]
