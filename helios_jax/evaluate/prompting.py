"""Settings of lm-evaluation-harness that say how tasks become prompts: examples, chat templates."""

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from helios_jax.errors import require

if TYPE_CHECKING:
    from helios_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234  # the harness's own


class Prompting(NamedTuple):
    """Settings under the names that the harness gives them.

    Attributes:
      num_fewshot: solved examples in front of a question; None takes each task's own number. A task
        that says 0 keeps it.
      apply_chat_template: a prompt is a conversation, as the checkpoint's chat template renders it.
      system_instruction: text in front of a prompt; the system message of a conversation.
      fewshot_as_multiturn: examples are turns of the conversation; else all is one message.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str = ''
    fewshot_as_multiturn: bool = True

    def check(self) -> None:
        """Refuses a number of examples below 0."""
        n = self.num_fewshot
        require(n is None or n >= 0, f'num_fewshot={n} must be 0 (none) or more.')

    def described(self, tokenizer: 'Tokenizer') -> dict[str, Any]:
        """Returns the settings that answers depend on, with the template's fingerprint."""
        chat = self.apply_chat_template
        return self._asdict() | {
            'fewshot_as_multiturn': chat and self.fewshot_as_multiturn,
            'chat_template': tokenizer.chat_template.fingerprint if chat else '',
        }

    def set_examples(self, tasks: dict[str, Any]) -> None:
        """Sets how many examples each loaded task shows, and draws them as the harness does.

        Raises:
          UserError: a task has fewer examples than it is to show.
        """
        for name, task in tasks.items():
            own, wanted = task.get_config('num_fewshot'), self.num_fewshot
            if own == 0 and wanted:
                log.warning('%s shows no examples, as its file says, despite num_fewshot.', name)
            elif own is None or wanted is not None:
                task.set_config(key='num_fewshot', value=wanted or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            shown = task.get_config('num_fewshot')
            there = _examples(task) if shown else 0
            require(
                shown <= there,
                f'num_fewshot={shown}, but task {name!r} has {there} examples to show; lower it.',
            )


AS_TASKS_SAY = Prompting()


def _examples(task: Any) -> int:
    """Counts what the task draws its examples from, without the question itself."""
    among_questions = task.fewshot_cfg.split == task.config.test_split
    return len(task.sampler.df) - int(among_questions)
