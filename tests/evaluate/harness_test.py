"""Benchmarks' figures are those of a direct computation, batched, sharded, resumed or not."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import scores_of_one
import task_files
import tiny_restored
from etils import epath
from refusals import refused

from helios_jax import cli
from helios_jax.errors import UserError
from helios_jax.evaluate import benchmarks, command

pytest.importorskip('lm_eval')

import lm_eval.tasks
from lm_eval.api.instance import Instance

from helios_jax.evaluate import harness
from helios_jax.evaluate.responses import Responses, identity

pytestmark = pytest.mark.usefixtures('quick_runs')

BOS, EOS = 0xFE, 0xFF


@pytest.fixture(scope='module')
def tasks_directory(tmp_path_factory) -> Path:
    return task_files.write(tmp_path_factory.mktemp('tasks') / 'tasks')


@pytest.fixture(scope='module', autouse=True)
def own_data_cache(tmp_path_factory):
    """A cache of data sets that nothing else has filled."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp('data'))
        patch.setattr(datasets.config, 'HF_DATASETS_CACHE', cache)
        yield


def direct(context: str, text: str) -> tuple[float, bool]:
    """ln p(text | context), and whether greedy decoding writes it."""
    before, after = [BOS, *context.encode()], list(text.encode())
    each = scores_of_one.log_p((*before, *after))[len(before) - 1 : -1]
    return float(sum(each[range(len(after)), after])), bool((each.argmax(axis=1) == after).all())


def greedy(context: str, max_tokens: int, stop: str) -> str:
    tokens = [BOS, *context.encode()]
    start = len(tokens)
    for _ in range(max_tokens):
        token = int(scores_of_one.log_p(tuple(tokens))[-1].argmax())
        if token == EOS:
            break
        tokens.append(token)
    written = bytes(t for t in tokens[start:] if t != BOS)
    return written.decode(errors='replace').split(stop)[0]


def rolling(text: str, length: int) -> float:
    """Rows of `length` tokens at most: BOS, what is read again, what is scored."""
    data, done, total = text.encode(), 0, 0.0
    while done < len(data):
        end = min(len(data), length - 1 if done == 0 else done + length - 2)
        row = (BOS, *data[max(0, end - length + 1) : end])
        scored = end - done
        each = scores_of_one.log_p(row)[len(row) - scored - 1 : -1]
        total += float(sum(each[range(scored), list(row[-scored:])]))
        done = end
    return total


def expected(task: str) -> dict[str, float]:
    """The figures of a task, document by document."""
    if task == 'quiz':
        hits, hits_by_byte = [], []
        for quiz in task_files.QUIZ:
            scores = [direct(quiz['question'], f' {c}')[0] for c in quiz['choices']]
            by_byte = np.divide(scores, [len(c) for c in quiz['choices']])
            hits.append(np.argmax(scores) == quiz['answer'])
            hits_by_byte.append(np.argmax(by_byte) == quiz['answer'])
        return {'acc,none': np.mean(hits), 'acc_norm,none': np.mean(hits_by_byte)}
    if task == 'texts':
        nats = -sum(rolling(text, tiny_restored.TRAINED) for text in task_files.TEXTS)
        num_bytes = sum(len(text.encode()) for text in task_files.TEXTS)
        bits = nats / num_bytes / math.log(2)
        return {'byte_perplexity,none': math.exp(nats / num_bytes), 'bits_per_byte,none': bits}
    if task == 'last_words':
        words = [direct(d['context'], f' {d["word"]}') for d in task_files.LAST_WORDS]
        perplexity = math.exp(-np.mean([score for score, _ in words]))
        return {'perplexity,none': perplexity, 'acc,none': np.mean([hit for _, hit in words])}
    written = [greedy(d['question'], 5, '\n') == d['answer'] for d in task_files.SUMS]
    return {'exact_match,none': np.mean(written)}


def run(directory: Path, restored=None, names=tuple(task_files.TASKS), **settings) -> dict:
    tasks = benchmarks.load(names, str(directory))
    return benchmarks.run(restored or tiny_restored.restored(), tasks, **settings)


def close(found: dict, wanted: dict) -> None:
    for task, figures in wanted.items():
        for name, value in figures.items():
            np.testing.assert_allclose(found[task][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('names', [('quiz', 'texts', 'last_words'), ('sums',)], ids=' '.join)
def test_figures_of_four_kinds_of_tasks_are_those_of_a_direct_computation(
    names, tasks_directory, tmp_path
):
    results = run(tasks_directory, names=names, output=str(tmp_path))
    close(results['results'], {name: expected(name) for name in names})
    if 'quiz' in names:
        p = results['results']['quiz']['acc,none']
        np.testing.assert_allclose(
            results['results']['quiz']['acc_stderr,none'], math.sqrt(p * (1 - p) / 3)
        )
        assert results['results']['last_words']['perplexity_stderr,none'] > 0
    written = json.loads((tmp_path / 'results.json').read_text())
    assert written['results'] == results['results'] and results['truncated'] == 0
    table = (tmp_path / 'results.md').read_text()
    assert all(name in table for name in names) and '±' in table
    # What is in the file is not computed again.
    lines = (tmp_path / 'responses.jsonl').read_text().splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, 'score', None)
        patch.setattr(harness, 'continued', None)
        again = run(tasks_directory, names=names, output=str(tmp_path))
    assert again == results
    assert (tmp_path / 'responses.jsonl').read_text().splitlines() == lines


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i, ('t', i, 1)) for i, each in enumerate(arguments)]


def asked(**settings) -> harness.HarnessModel:
    return harness.HarnessModel(tiny_restored.restored(), **settings)


PAIRS = [
    (choice['question'], f' {text}') for choice in task_files.QUIZ for text in choice['choices']
]


@pytest.mark.slow
def test_a_batch_answers_as_one_by_one():
    one = asked(batch_rows=1)
    together = asked().loglikelihood(requests('loglikelihood', *PAIRS))
    alone = [one.loglikelihood(requests('loglikelihood', pair))[0] for pair in PAIRS]
    np.testing.assert_allclose([x for x, _ in together], [x for x, _ in alone], rtol=1e-5)
    assert [x for _, x in together] == [x for _, x in alone]
    settings = {'until': ['q'], 'max_gen_toks': 6}
    prompts = [(question['question'], settings) for question in task_files.QUIZ[:2]]
    texts = asked().generate_until(requests('generate_until', *prompts))
    each = [one.generate_until(requests('generate_until', p))[0] for p in prompts]
    assert texts == each


@pytest.mark.slow
def test_eight_devices_find_what_one_does(tasks_directory):
    devices = tiny_restored.restored(8, context=2)
    assert identity(devices) == identity(tiny_restored.restored())
    names = 'quiz', 'sums'
    one = run(tasks_directory, names=names)['results']
    eight = run(tasks_directory, devices, names)['results']
    for task, figures in one.items():
        figures = {name: v for name, v in figures.items() if isinstance(v, float)}
        close(eight, {task: figures})


def test_equal_requests_are_asked_once():
    model, two = asked(), (PAIRS[0], PAIRS[-1])
    calls = []
    real = harness.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, 'score', lambda *args: calls.append(args[1]) or real(*args))
        answers = model.loglikelihood(requests('loglikelihood', *two, *two))
    assert answers[:2] == answers[2:] and [len(pairs) for pairs in calls] == [2]


@pytest.mark.slow
def test_choices_of_one_context_are_scored_together():
    model, calls = asked(), []
    real = harness.score_choices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, 'score_choices', lambda *args: calls.append(args[1]) or real(*args))
        context = 'twelve'
        pairs = [(context, ' is 12'), ('ten', ' is 10'), (context, ' is 13'), (context, ' is 12')]
        answers = model.loglikelihood(requests('loglikelihood', *pairs))
    assert [[len(one.choices) for one in some] for some in calls] == [[2]]
    for (nats, greedy), pair in zip(answers, pairs, strict=True):
        wanted = direct(*pair)
        assert math.isclose(nats, wanted[0], rel_tol=1e-5) and greedy == wanted[1]


@pytest.mark.slow
def test_samples_of_one_context_differ_and_repeat():
    drawing = ('ab', {'until': [], 'max_gen_toks': 6, 'do_sample': True, 'temperature': 1.0})
    drawn = asked().generate_until(requests('generate_until', drawing, drawing, drawing))
    assert len(set(drawn)) == 3
    assert drawn == asked().generate_until(requests('generate_until', drawing, drawing, drawing))


def test_a_limit_cuts_the_beginning_of_contexts_and_counts_them():
    model = asked(max_length=40)
    context = 'left out: ' + 'k' * 34
    # BOS, 35 bytes of context and 4 more fill a row of 40.
    found = model.loglikelihood(requests('loglikelihood', (context, ' xyz'), ('a', ' xyz')))
    np.testing.assert_allclose(
        [score for score, _ in found], [direct(' ' + 'k' * 34, ' xyz')[0], direct('a', ' xyz')[0]],
        rtol=1e-5,
    )  # fmt: skip
    assert model.num_truncated == 1
    with pytest.raises(UserError, match='50 tokens after a context, and --max_length=40'):
        model.loglikelihood(requests('loglikelihood', ('a', 'x' * 50)))
    rows = model.loglikelihood_rolling(requests('loglikelihood_rolling', ('p' * 99,), ('',)))
    np.testing.assert_allclose(rows, [rolling('p' * 99, 40), 0], rtol=1e-5)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: asked().generate_until(
                requests('generate_until', ('a', {'until': [], 'num_beams': 3}))
            ),
            'sets num_beams in generation_kwargs',
        ),
        (
            lambda: asked().loglikelihood(requests('loglikelihood', ('', ''))),
            'without context and continuation',
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_answers_of_another_model_or_lines_that_are_none_are_refused(tmp_path):
    path = epath.Path(tmp_path / 'responses.jsonl')
    kept = Responses(path, 'one')
    kept.add({'a': [-1.5, True], 'b': 'text'})
    with pytest.raises(UserError, match='answers of another model'):
        Responses(path, 'two')
    with path.open('a') as file:
        file.write('{"question": "c", "ans')  # torn by a kill
    again = Responses(path, 'one')
    assert 'c' not in again and (again['a'], again['b']) == ([-1.5, True], 'text')
    again.add({'c': 1})
    assert Responses(path, 'one')['c'] == 1
    path.write_text(path.read_text().replace('"question": "b"', '"b"'))
    with pytest.raises(UserError, match='line 3 is no answer'):
        Responses(path, 'one')


@pytest.mark.slow
def test_the_identity_of_a_model_is_that_of_each_weight_and_of_its_positions():
    made = tiny_restored.restored()
    leaves, tree = jax.tree.flatten(made.variables)
    found = {identity(made), identity(tiny_restored.restored(scaling='dynamic'))}
    for index, leaf in enumerate(leaves):
        changed = [*leaves]
        changed[index] = leaf.at[(0,) * leaf.ndim].multiply(1.0000002)
        found.add(identity(made._replace(variables=jax.tree.unflatten(tree, changed))))
    assert len(found) == 2 + len(leaves)
    swapped = [leaf[::-1] for leaf in leaves]
    assert identity(made._replace(variables=jax.tree.unflatten(tree, swapped))) not in found


class KilledError(Exception):
    """An evaluation ends here."""


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_to_the_same_results(tasks_directory, tmp_path):
    add = Responses.add

    def add_and_die(self, answers):
        add(self, answers)
        if 7 < len(self._answers) < 12:
            raise KilledError

    settings = {'names': ('quiz', 'texts'), 'batch_rows': 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Responses, 'add', add_and_die)
        with pytest.raises(KilledError):
            run(tasks_directory, output=str(tmp_path / 'a'), **settings)
    killed = tmp_path / 'a' / 'responses.jsonl'
    lines = killed.read_text().splitlines()
    killed.write_text(killed.read_text()[:-5])  # while the last line was written
    resumed = run(tasks_directory, output=str(tmp_path / 'a'), **settings)
    whole = run(tasks_directory, output=str(tmp_path / 'b'), **settings)
    assert resumed == whole
    answers = [(tmp_path / x / 'responses.jsonl').read_text().splitlines() for x in 'ab']
    assert sorted(answers[0]) == sorted(answers[1]) and answers[0][: len(lines) - 1] == lines[:-1]
    assert 8 < len(lines) < len(answers[0])


@pytest.mark.slow
def test_the_command_prints_the_table_or_json(tasks_directory, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, 'restore', lambda values: tiny_restored.restored())
    monkeypatch.setattr(command, 'prepare', lambda values: None)
    arguments = ['eval', '--checkpoint=a_run', f'--include_path={tasks_directory}', '--limit=2']
    arguments += ['--tasks=quiz,last_words', f'--output={tmp_path}/new']
    cli.main(arguments)
    table = capsys.readouterr().out
    assert table.startswith('|') and re.search(r'\|quiz +\|', table)
    assert 'acc_norm' in table and '±' in table
    cli.main([*arguments, '--json'])
    results = json.loads(capsys.readouterr().out)
    assert results['n-samples']['quiz'] == {'original': 4, 'effective': 2}
    assert results == json.loads((tmp_path / 'new' / 'results.json').read_text())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--tasks=quizz'], "'quizz' is no task. Did you mean 'quiz'"),
        (['--tasks=gone'], 'gone cannot be loaded: .*mend its files'),
        (['--tasks=quiz', '--text=x'], '--text and --tasks are two evaluations'),
        (['--tasks=quiz', '--output=gs://x/y'], '--output=gs://x/y must be a local'),
        (['--tasks=quiz', '--include_path=none'], '--include_path=none is no directory'),
        (['--tasks=quiz', '--limit=-1'], r'limit=-1 must be 0 \(all\) or more'),
        (['--tasks=quiz', '--batch_rows=0'], 'batch_rows=0 must be above 0'),
        (['--tasks=quiz', '--max_length=2'], r'max_length=2 must be 0 \(no limit\) or at least 3'),
    ],
)
def test_a_task_that_cannot_be_run_is_one_line(
    arguments, message, tasks_directory, capsys, monkeypatch, tmp_path
):
    (tmp_path / 'gone.yaml').write_text(
        (tasks_directory / 'quiz.yaml').read_text().replace('quiz', 'gone')
    )
    (tmp_path / 'quiz.yaml').write_text((tasks_directory / 'quiz.yaml').read_text())
    manager = lm_eval.tasks.TaskManager
    own = lambda include_path, **_: manager(include_path=include_path, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, 'TaskManager', own)  # its own files take long to read
    paths = ['--checkpoint=nowhere', f'--include_path={tmp_path}']
    line = refused(capsys, 'eval', *paths, *arguments)
    assert re.search(message, line), line


def test_the_extra_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(benchmarks, 'PACKAGE', 'no_such_package')
    line = refused(capsys, 'eval', '--checkpoint=nowhere', '--tasks=quiz', alone=True)
    assert "pip install 'helios_jax[eval]'" in line
