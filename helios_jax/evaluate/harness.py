"""A model as lm-evaluation-harness asks for it: log-likelihoods and texts.

Rows start with BOS, as rows of training do. Requests are sorted by length, padded to few shapes and
spread over the mesh; equal ones are computed once, and so is a context that choices share. Needs
the extra `eval`.
"""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from helios_jax import display
from helios_jax.data import chat
from helios_jax.errors import require
from helios_jax.evaluate import conversation
from helios_jax.evaluate.generate import continued, warn_of_length
from helios_jax.evaluate.questions import batches, questions, score_choices
from helios_jax.evaluate.responses import Responses, digest
from helios_jax.evaluate.scores import Pair, RowBatch, TokenScores, score, shapes, windows
from helios_jax.restoring import Restored, mesh_of

log = logging.getLogger(__name__)

# What a phase is called, and what it counts.
TITLES = {
    'score': ('Scoring rows', 'rows'),
    'choices': ('Scoring choices', 'contexts'),
    'generate': ('Generating texts', 'rows'),
}
# What a task may ask for in `generation_kwargs`.
GENERATION = {'until', 'max_gen_toks', 'do_sample', 'temperature', 'top_k', 'top_p'}


class HarnessModel(TemplateLM):
    """Answers the requests of lm-evaluation-harness with a restored model.

    Args:
      batch_rows: rows of the run's length at a time, above 0; of shorter rows as many more.
      max_length: tokens of a row, at least 3. Longer contexts lose their beginning, and
        `num_truncated` counts them; texts of rolling tasks are cut into rows of it. 0 cuts no
        context, and texts into rows of the length that the model was made for.
      apply_chat_template: what the harness is told under this name; contexts are then what the
        method of this name rendered, and an answer ends with its turn.
      responses: answers that are there already, and where new ones go; in memory if left out.
    Raises:
      UserError: a chat template that cannot be used; later, a request that cannot be answered.
    """

    def __init__(
        self,
        restored: Restored,
        *,
        batch_rows: int = 16,
        max_length: int = 0,
        apply_chat_template: bool = False,
        responses: Responses | None = None,
    ) -> None:
        super().__init__()
        self.restored = restored
        self.max_length = max_length
        self.num_truncated = 0
        self._batch_tokens = batch_rows * restored.config.data.row_length
        self._chat = apply_chat_template
        self._ends = conversation.turn_ends(restored.tokenizer) if apply_chat_template else ()
        self._responses = responses or Responses(None, model='')

    @property
    def eot_token_id(self) -> int:
        return self.restored.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.restored.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness may keep rendered prompts: no other template shares it."""
        tokenizer = self.restored.tokenizer
        return f'{tokenizer.fingerprint}-{tokenizer.chat_template.fingerprint}'

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the checkpoint's template, whichever name is asked for."""
        return self.restored.tokenizer.chat_template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation as `helios generate --chat` does; the result is for `tok_encode`.

        Args:
          chat_history: messages of a role and its content.
          add_generation_prompt: opens the answer; else the last message is its beginning.
        """
        if not self._chat:
            raise ValueError('HarnessModel needs apply_chat_template=True as well.')
        tokenizer, goes_on = self.restored.tokenizer, not add_generation_prompt
        return conversation.rendered(tokenizer, chat_history, goes_on=goes_on)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a context and what follows it, BOS first; without BOS it is a text alone."""
        tokenizer = self.restored.tokenizer
        if add_special_tokens is False:
            return tokenizer.encode(string)
        if self._chat:
            return conversation.encoded(tokenizer, string)
        return [self.prefix_token_id, *tokenizer.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._chat:  # names of special tokens are text in the continuation
            continuation = chat.cut(continuation, self.restored.tokenizer)
        return super()._encode_pair(context, continuation)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Computes ln p(continuation | context), and whether greedy decoding would write it."""
        empty = any(not ''.join(request.args) for request in requests)
        require(not empty, 'a task has a request without context and continuation; mend its files.')
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(before, after) for _, before, after in requests]
        self._warn()
        return self._scored(pairs)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Computes ln p of whole texts, each of whose tokens is scored once, in one of its rows."""
        rope = self.restored.model.model.rope
        length = self.max_length or (rope.trained_length if rope.grows else int(rope.reach))
        tokenizer = self.restored.tokenizer
        texts = tokenizer.encode_batch([request.args[0] for request in requests])
        rows = [list(windows(text, tokenizer.bos_id, length, length - 2)) for text in texts]
        scored = iter(self._scored([pair for pairs in rows for pair in pairs]))
        return [sum((next(scored)[0] for _ in pairs), 0.0) for pairs in rows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continues contexts as each request says: greedily, unless it samples."""
        prompts: list[tuple[list[int], dict[str, Any]]] = []
        repeats: dict[str, int] = {}
        for request in requests:
            context, settings = request.args[0], _settings(request.args[1])
            tokens = self._last(self.tok_encode(context), settings['max_tokens'])
            if settings['temperature'] > 0:  # each repetition draws anew
                key = digest(tokens, settings)
                repeats[key] = repeats.get(key, -1) + 1
                settings |= {'seed': repeats[key]}
            prompts.append((tokens, settings))
        self._warn()
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, (_, settings) in enumerate(prompts):
            groups.setdefault(json.dumps(settings), []).append(index)
        for wanted, own in groups.items():
            settings = json.loads(wanted)
            longest = max(len(prompts[i][0]) for i in own)
            warn_of_length(self.restored.model.model.rope, longest, settings['max_tokens'])
            more = settings['max_tokens']
            texts = self._answers(
                'generate',
                [prompts[i] for i in own],
                lambda some, *sizes, more=more: shapes([len(t) + more for t, _ in some], *sizes),
                lambda some, shape, settings=settings: self._continued(some, shape, settings),
            )
            answers |= dict(zip(own, texts, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def _scored(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        lengths = [len(before) + len(after) for before, after in pairs]
        rope = self.restored.model.model.rope
        beyond = sum(length > rope.reach for length in lengths)
        if beyond:
            log.warning(
                '%d of %d rows are longer than the %d tokens that the model was made for; beyond '
                'them scores mean little unless --yarn=dynamic stretches positions, or '
                '--max_length cuts rows.', beyond, len(pairs), rope.reach,
            )  # fmt: skip

        asked = questions(pairs, mesh_of(self.restored.variables))
        alone = [(one.context, one.choices[0]) for one in asked if len(one.choices) == 1]
        together = [one for one in asked if len(one.choices) > 1]
        each = self._answers(
            'score',
            alone,
            lambda some, *sizes: shapes([len(a) + len(b) for a, b in some], *sizes),
            lambda some, shape: [total(one) for one in score(self.restored, some, shape)],
        )
        lists = self._answers(
            'choices',
            together,
            batches,
            lambda some, batch: [
                [total(choice) for choice in one]
                for one in score_choices(self.restored, some, batch)
            ],
        )
        found = {digest(*pair): answer for pair, answer in zip(alone, each, strict=True)}
        for one, answers in zip(together, lists, strict=True):
            own = zip(one.choices, answers, strict=True)
            found |= {digest(one.context, choice): answer for choice, answer in own}
        return [(nats, greedy) for nats, greedy in (found[digest(*pair)] for pair in pairs)]

    def _continued(self, some: list[Any], shape: RowBatch, settings: dict[str, Any]) -> list[str]:
        prompts = [tokens for tokens, _ in some]
        filled = [*prompts, *[prompts[-1]] * (shape.num_rows - len(prompts))]
        return continued(self.restored, filled, end_ids=self._ends, **settings)[: len(prompts)]

    def _answers(
        self,
        kind: str,
        asked: Sequence[Any],
        batched: Callable[..., Sequence[Any]],
        compute: Callable[[list[Any], Any], list[Any]],
    ) -> list[Any]:
        """Answers questions a batch at a time, but for batches whose answers are all there.

        Args:
          batched: makes batches of (questions, mesh, tokens of a batch), each with `indices`.
          compute: answers (the questions of a batch, the batch).
        """
        if not asked:
            return []
        keys = [digest(kind, *question) for question in asked]
        own: list[tuple[str, Any]] = list(dict(zip(keys, asked, strict=True)).items())
        mesh = mesh_of(self.restored.variables)
        title, unit = TITLES[kind]
        with display.phase(title, len(own), unit) as advance:
            for batch in batched([question for _, question in own], mesh, self._batch_tokens):
                some = [own[index] for index in batch.indices]
                if not all(key in self._responses for key, _ in some):
                    found = compute([question for _, question in some], batch)
                    self._responses.add(dict(zip([key for key, _ in some], found, strict=True)))
                advance(len(some))
        return [self._responses[key] for key in keys]

    def _fitting(self, before: list[int], after: list[int]) -> Pair:
        return self._last(before, len(after)), after

    def _last(self, tokens: list[int], more: int) -> list[int]:
        """BOS and as many of the last tokens as leave room for `more` within `max_length`."""
        if not self.max_length or len(tokens) + more <= self.max_length:
            return tokens
        kept = self.max_length - more - 1
        require(
            kept > 0,
            f'a task asks for {more} tokens after a context, and --max_length={self.max_length} '
            'leaves no room for any of it; raise it, or set 0 for no limit.',
        )
        self.num_truncated += 1
        return [tokens[0], *tokens[-kept:]]

    def _warn(self) -> None:
        if self.num_truncated:
            log.warning(
                '%d contexts lost their beginning to --max_length=%d.',
                self.num_truncated, self.max_length,
            )  # fmt: skip


def total(tokens: TokenScores) -> tuple[float, bool]:
    """Returns ln p of all tokens, and whether each is the likeliest."""
    return -float(tokens.nats.sum(dtype='float64')), bool(tokens.likeliest.all())


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns a request's `generation_kwargs` as `generate` takes them.

    Raises:
      UserError: one that `generate` knows nothing of.
    """
    known = normalize_gen_kwargs(kwargs)
    unknown = sorted(known.keys() - GENERATION)
    require(
        not unknown,
        f'a task sets {", ".join(unknown)} in generation_kwargs, and only '
        f'{", ".join(sorted(GENERATION))} can be set; take it out of the task.',
    )
    return {
        'max_tokens': known['max_gen_toks'],
        'stop': [text for text in known['until'] if text],
        'temperature': known.get('temperature', 0.0) if known['do_sample'] else 0.0,
        'top_k': known.get('top_k', 0),
        'top_p': known.get('top_p', 1.0),
    }
