"""Benchmarks by lm-evaluation-harness: finds tasks, runs them offline, and writes the results.

Needs the extra `eval`, which is imported when a task is asked for.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from helios_jax import display, options, paths
from helios_jax.data.tokenizer import Tokenizer
from helios_jax.errors import UserError, nearest, require
from helios_jax.evaluate import conversation, responses
from helios_jax.evaluate.conversation import Chat
from helios_jax.evaluate.prompting import AS_TASKS_SAY, Prompting
from helios_jax.restoring import Restored

PACKAGE = 'lm_eval'
OFFLINE = {
    # The user may set another value: what is not on this machine is then downloaded.
    'HF_HUB_OFFLINE': '1',
    'HF_DATASETS_OFFLINE': '1',
    'TRANSFORMERS_OFFLINE': '1',
    'HF_UPDATE_DOWNLOAD_COUNTS': '0',
    # Its standard errors come from a pool of forked processes, which JAX's threads do not survive.
    'DISABLE_MULTIPROC': '1',
    'TQDM_DISABLE': '1',  # its bars; the display has ours
}
BOOTSTRAP_DRAWS = 1000  # of metrics whose standard error has no closed form
SHORTEST_LIMIT = 3  # tokens: BOS, one that is read, one that is scored


def check(limit: int, batch_rows: int, max_length: int) -> None:
    """Refuses numbers that `run` cannot take."""
    require(limit >= 0, f'limit={limit} must be 0 (all) or more.')
    require(batch_rows > 0, f'batch_rows={batch_rows} must be above 0.')
    require(
        max_length == 0 or max_length >= SHORTEST_LIMIT,
        f'max_length={max_length} must be 0 (no limit) or at least {SHORTEST_LIMIT}.',
    )


def load(
    names: Sequence[str], include_path: str = '', prompting: Prompting = AS_TASKS_SAY
) -> dict[str, Any]:
    """Loads tasks and their data, from `include_path` or else from the harness itself.

    Args:
      names: tasks, groups or tags.
      include_path: directory of task files. They are code: they may name Python functions.
      prompting: says how many examples they show.
    Returns:
      What `lm_eval.evaluator.evaluate` takes as its tasks.
    Raises:
      UserError: the extra is missing; no such task, or one whose files or data cannot be
        read, or that has fewer examples than it is to show.
    """
    require(
        importlib.util.find_spec(PACKAGE) is not None,
        "--tasks needs lm-evaluation-harness: pip install 'helios_jax[eval]'.",
    )
    require(
        not include_path or Path(include_path).is_dir(),
        f'--include_path={include_path} is no directory; name one that has task files.',
    )
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    with display.phase('Loading tasks'):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=include_path or None, include_defaults=False)
        if set(names) - set(manager.all_tasks):  # reading all of the harness's files takes long
            manager = TaskManager(include_path=include_path or None)
        for name in names:
            require(
                name in manager.all_tasks,
                f'--tasks: {name!r} is no task.{nearest(name, manager.all_tasks)}',
            )
        try:
            loaded: Any = manager.load(list(names))
        except Exception as error:  # whatever data sets and the functions of tasks raise
            raise UserError(
                f'--tasks={",".join(names)} cannot be loaded: {type(error).__name__}: {error}; '
                'mend its files, or see that its data is on this machine (nothing is downloaded '
                'unless HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0).'
            ) from error
    prompting.set_examples(loaded['tasks'])
    return loaded


def check_descriptions(tokenizer: Tokenizer, tasks: dict[str, Any]) -> None:
    """Refuses tasks whose own description is a system message that the chat template refuses.

    Args:
      tasks: what `load` returned.
    Raises:
      UserError: there is one.
    """
    for name, task in tasks['tasks'].items():
        # A description may be a template over the fields of a document, and empty for some.
        wanted = task.config.description
        texts = (task.resolve_field(doc, wanted) for doc in task.eval_docs) if wanted else ()
        try:
            system = next(filter(None, texts), '')
        except Exception as error:  # whatever functions that a template calls raise
            raise UserError(
                f'the description of task {name!r} cannot be read: {error}; mend its file.'
            ) from error
        if not system:
            continue
        try:
            conversation.opened(tokenizer, 'a', Chat(system))
        except UserError as error:
            raise UserError(
                f'the description of task {name!r} is a system message, and '
                f"{str(error).rstrip('.')}; take it out of the task's file, or do without "
                'apply_chat_template.'
            ) from error


def run(
    restored: Restored,
    tasks: dict[str, Any],
    *,
    prompting: Prompting = AS_TASKS_SAY,
    limit: int = 0,
    batch_rows: int = 16,
    max_length: int = 0,
    output: str = '',
) -> dict[str, Any]:
    """Runs loaded tasks; an evaluation that was interrupted goes on where `output` has answers.

    Args:
      prompting: what `load` was given.
      limit: documents of each task; 0 takes all.
      batch_rows: as `HarnessModel`.
      max_length: as `HarnessModel`.
      output: directory for results.json, results.md and the answers; '' keeps nothing.
    Returns:
      The harness's results with standard errors, and `model`, `truncated`, `limit`, `lm_eval`, the
      fields of `prompting`, and `chat_template`, the fingerprint of the template that was applied.
    Raises:
      UserError: a number out of range; a chat template that is absent, cannot be used, or refuses
        the description of a task; a task that this model cannot do; `output` has answers of another
        model or of other prompts.
    """
    check(limit, batch_rows, max_length)
    if prompting.apply_chat_template:
        conversation.check(restored.tokenizer, Chat(prompting.system_instruction))
        check_descriptions(restored.tokenizer, tasks)
    from lm_eval.evaluator import evaluate

    from helios_jax.evaluate.harness import HarnessModel

    folder = epath.Path(output).expanduser() if output else None
    model, prompts = responses.identity(restored), prompting.described(restored.tokenizer)
    known = responses.Responses(
        folder / responses.FILE if folder else None, responses.digest(model, prompts)
    )
    asked = HarnessModel(
        restored, batch_rows=batch_rows, max_length=max_length, responses=known,
        apply_chat_template=prompting.apply_chat_template,
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results alone
            found: Any = evaluate(
                asked,
                tasks,
                limit=limit or None,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                log_samples=False,
                system_instruction=prompting.system_instruction or None,
                apply_chat_template=prompting.apply_chat_template,
                fewshot_as_multiturn=prompting.fewshot_as_multiturn,
            )
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UserError(f'--tasks: {error}') from error
    results = json.loads(json.dumps(found, default=str)) | {
        **prompts,
        'model': model,
        'truncated': asked.num_truncated,
        'limit': limit,
        'lm_eval': importlib.metadata.version(PACKAGE),
    }
    if folder and display.speaks():
        paths.write_whole(folder / 'results.json', (options.to_json(results) + '\n').encode())
        paths.write_whole(folder / 'results.md', table(results).encode())
    return results


def table(results: dict[str, Any]) -> str:
    """Formats results as Markdown: a row a metric, with its standard error."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get('groups'):
        tables.append(make_table(results, 'groups'))
    return '\n'.join(tables)
