"""Times requests of lm-evaluation-harness, answered by us and by the harness's own `hf` model.

    helios bench eval --config=helios_1b

Both score one multiple-choice task file with one random checkpoint, each in a process of its own.
The clock runs over the second time that all requests are answered: what is compiled, the search of
`hf` for its automatic batch size, and the loading of either are left out.
"""

import functools
import importlib.metadata
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helios_jax import config, display, options, process
from helios_jax.bench import random_checkpoint
from helios_jax.bench.random_checkpoint import FIRST_WORD
from helios_jax.errors import require

TASK, CHOICES = 'bench', 4
SHORTEST, MEDIAN, LONGEST, SPREAD = 60, 150, 400, 0.5  # tokens of a request; SPREAD is of its log
LONGEST_CHOICE = 12  # words


def compare_harness(
    cfg: config.Config, *, requests: int, batch_rows: int, dtype: str, as_json: bool
) -> list[dict[str, Any]]:
    """Measures both sides on requests of the config's shape, and prints a row each and the ratio.

    Args:
      requests: how many, a multiple of `CHOICES`.
      batch_rows: ours, as of `helios eval`.
      dtype: of the checkpoint, float32 or bfloat16.
    Raises:
      UserError: a number out of range, or a shape that no family of Hugging Face's has.
    """
    require(
        requests > 0 and requests % CHOICES == 0,
        f'--requests={requests} must be a multiple of {CHOICES}, the choices of a question.',
    )
    require(batch_rows > 0, f'--batch_rows={batch_rows} must be above 0.')
    require(
        cfg.data.row_length > LONGEST,
        f'data.row_length={cfg.data.row_length} must be above {LONGEST}, the tokens of a request.',
    )
    with tempfile.TemporaryDirectory(prefix='helios_eval_') as folder:
        model, tasks = Path(folder) / 'model', Path(folder) / 'tasks'
        random_checkpoint.write(cfg, model, dtype)
        write_task(tasks, cfg.model.vocab_size, requests // CHOICES)
        ours = process.run(measure_ours, str(model), str(tasks), batch_rows, cfg.data.row_length)
        theirs = process.run(measure_theirs, str(model), str(tasks))
    # Of the same weights, in another order of sums: a check that both do the same work.
    gap = [abs(a - b) for a, b in zip(ours.pop('scores'), theirs.pop('scores'), strict=True)]
    ratio = ours['requests_per_second'] / theirs['requests_per_second']
    rows = [ours, theirs | {'ratio': ratio, 'mean_gap_nats': sum(gap) / len(gap)}]
    if as_json:
        print(*map(options.to_json, rows), sep='\n')
    else:
        display.table(described(rows))
    return rows


def write_task(directory: Path, vocab_size: int, questions: int, seed: int = 0) -> None:
    """Writes a multiple-choice task of random words, whose lengths are those of natural text."""
    directory.mkdir()
    rng = random.Random(seed)
    text = lambda n: ' '.join(f'w{rng.randrange(FIRST_WORD, vocab_size)}' for _ in range(n))
    lines = []
    for _ in range(questions):
        length = min(max(rng.lognormvariate(math.log(MEDIAN), SPREAD), SHORTEST), LONGEST)
        choices = [text(rng.randint(2, LONGEST_CHOICE)) for _ in range(CHOICES)]
        question = text(int(length) - LONGEST_CHOICE)
        answer = rng.randrange(CHOICES)
        lines.append(json.dumps({'question': question, 'choices': choices, 'answer': answer}))
    (directory / f'{TASK}.jsonl').write_text('\n'.join(lines) + '\n')
    (directory / f'{TASK}.yaml').write_text(
        f'task: {TASK}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n'
        f'  data_files: {{test: "{directory / TASK}.jsonl"}}\n'
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        'metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
    )


def measure_ours(model: str, tasks: str, batch_rows: int, row_length: int) -> dict[str, Any]:
    """Answers the requests with our model."""
    import jax

    from helios_jax.convert import importing
    from helios_jax.evaluate.harness import HarnessModel

    questions = instances(tasks)
    restored = importing.load(importing.open_directory(model))
    cfg = config.replace(restored.config, {'data.row_length': row_length})
    restored = restored._replace(config=cfg)
    make = functools.partial(HarnessModel, restored, batch_rows=batch_rows)
    seconds, scores = timed(lambda: make().loglikelihood(questions))  # each knows no answer yet
    device = jax.devices()[0].device_kind
    return row('helios', seconds, scores) | {'device': device, 'jax': jax.__version__}


def measure_theirs(model: str, tasks: str) -> dict[str, Any]:
    """Answers the requests with the harness's `hf` model, at its automatic batch size."""
    os.environ.setdefault('TQDM_DISABLE', '1')
    questions = instances(tasks)
    import torch
    from lm_eval.models.huggingface import HFLM

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    asked: Any = HFLM(model, batch_size='auto', device=device, add_bos_token=True)

    def answered() -> list[tuple[float, bool]]:
        found = asked.loglikelihood(questions, disable_tqdm=True)
        if asked.batch_size == 'auto':  # it would be searched for again
            asked.batch_size_per_gpu = asked.batch_sizes[0]
        if device == 'cuda':
            torch.cuda.synchronize()
        return found

    seconds, scores = timed(answered)
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'transformers')}
    return row('hf', seconds, scores) | {'batch_size': asked.batch_size, **versions}


def instances(tasks: str) -> list[Any]:
    """Loads the task file, and makes its requests."""
    from helios_jax.evaluate import benchmarks

    task = benchmarks.load([TASK], tasks)['tasks'][TASK]
    task.build_all_requests()
    found: list[Any] = task.instances
    return found


def timed(answer: Callable[[], list[tuple[float, bool]]]) -> tuple[float, list[float]]:
    """Answers twice; returns the seconds of the second time, and the scores."""
    answer()
    begin = time.perf_counter()
    found = answer()
    return time.perf_counter() - begin, [score for score, _ in found]


def row(side: str, seconds: float, scores: Sequence[float]) -> dict[str, Any]:
    return {
        'side': side,
        'requests': len(scores),
        'seconds': seconds,
        'requests_per_second': len(scores) / seconds,
        'lm_eval': importlib.metadata.version('lm_eval'),
        'scores': list(scores),
    }


def described(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    found = [(each['side'], f'{each["requests_per_second"]:.1f}', 'requests/s') for each in rows]
    return [*found, ('helios / hf', f'{rows[1]["ratio"]:.2f}', '')]
