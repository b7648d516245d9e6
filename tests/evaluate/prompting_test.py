"""Prompts of tasks are what the harness's settings name, rendered as a chat is."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest
import scores_of_one
import task_files
import tiny_restored
from etils import epath
from refusals import refused

from helios_jax import checkpoint, cli
from helios_jax.data.tokenizer import ByteTokenizer
from helios_jax.errors import UserError
from helios_jax.evaluate import benchmarks, command
from helios_jax.evaluate.prompting import FEWSHOT_SEED, Prompting
from helios_jax.evaluate.scores import TokenScores

pytest.importorskip('lm_eval')

from lm_eval.api.instance import Instance

from helios_jax.evaluate import harness

pytestmark = pytest.mark.usefixtures('quick_runs')

# A turn ends in BOS, which nothing but this template writes there.
TEMPLATE = (
    '{% for m in messages %}[{{ m.role }}]{{ m.content }}<|bos|>{% endfor %}'
    '{% if add_generation_prompt %}[assistant]{% endif %}'
)
BOS = b'\xfe'  # what the byte tokenizer has it as
SYSTEM = 'be brief'


@pytest.fixture(scope='module')
def restored(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp('tokenizer'))
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    tokenizer = ByteTokenizer()
    tokenizer.folder = folder
    return tiny_restored.restored()._replace(tokenizer=tokenizer)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path_factory.mktemp('data')))
        yield task_files.write(tmp_path_factory.mktemp('tasks') / 'tasks')


def answer(quiz: dict) -> str:
    return quiz['choices'][quiz['answer']]


def prompts(prompting: Prompting) -> list[bytes]:
    """Writes the prompt of each question of the quiz, BOS first, without the harness."""
    drawn = random.Random(FEWSHOT_SEED)
    made = []
    for quiz in task_files.QUIZ:
        shown = drawn.sample(task_files.QUIZ, prompting.num_fewshot or 0)
        system = prompting.system_instruction
        question = quiz['question']
        if not prompting.apply_chat_template:
            shots = [f'{q["question"]} {answer(q)}\n\n' for q in shown]
            made.append(BOS + ''.join([system, *shots, question]).encode())
            continue
        turns = [('system', system)] if system else []
        if prompting.fewshot_as_multiturn:
            for q in shown:
                turns += [('user', q['question']), ('assistant', answer(q))]
            turns.append(('user', question))
        else:
            shots = [f'{q["question"]} {answer(q)}\n\n' for q in shown]
            turns.append(('user', ''.join([*shots, question])))
        text = b''.join(f'[{role}]{content}'.encode() + BOS for role, content in turns)
        made.append(BOS + text + b'[assistant]')
    return made


def pairs(prompting: Prompting) -> list[tuple[bytes, bytes]]:
    """Writes each choice behind its prompt; the harness gives it the spaces that end the prompt."""
    found = []
    for prompt, quiz in zip(prompts(prompting), task_files.QUIZ, strict=True):
        for choice in quiz['choices']:
            before, after = prompt.rstrip(b' '), choice.encode()
            if not prompting.apply_chat_template:
                after = prompt[len(before) :] + b' ' + after
            found.append((before, after))
    return found


SETTINGS = [
    Prompting(apply_chat_template=True),
    Prompting(2, True, SYSTEM),
    Prompting(2, True, SYSTEM, fewshot_as_multiturn=False),
    Prompting(1, False, SYSTEM),
]


@pytest.mark.parametrize('prompting', SETTINGS, ids=str)
def test_prompts_are_what_the_settings_name_and_results_tell_them(
    prompting, restored, directory, tmp_path, monkeypatch
):
    asked = []

    def score(_, some, shape):
        asked.extend((bytes(before), bytes(after)) for before, after in some)
        return [
            TokenScores(np.ones(len(after), np.float32), np.zeros(len(after), bool))
            for _, after in some
        ]

    def score_choices(_, some, batch):
        return [score(_, [(one.context, choice) for choice in one.choices], batch) for one in some]

    monkeypatch.setattr(harness, 'score', score)
    monkeypatch.setattr(harness, 'score_choices', score_choices)
    tasks = benchmarks.load(['quiz'], str(directory), prompting)
    found = benchmarks.run(restored, tasks, prompting=prompting, output=str(tmp_path))
    assert sorted(asked) == sorted(pairs(prompting))
    assert found['n-shot']['quiz'] == (prompting.num_fewshot or 0)
    written = json.loads((tmp_path / 'results.json').read_text())
    for name in ('num_fewshot', 'apply_chat_template', 'system_instruction'):
        assert written[name] == getattr(prompting, name)
    chat = prompting.apply_chat_template
    assert written['fewshot_as_multiturn'] == (chat and prompting.fewshot_as_multiturn)
    assert (written['chat_template'] != '') == chat
    # What goes on in this directory has the same settings.
    others = {'num_fewshot': 3, 'system_instruction': 'x', 'apply_chat_template': not chat}
    for name, value in others.items():
        changed = prompting._replace(**{name: value})
        with pytest.raises(UserError, match='of other settings'):
            benchmarks.run(restored, tasks, prompting=changed, output=str(tmp_path))


@pytest.mark.slow
def test_figures_under_a_template_are_those_of_a_direct_computation(restored, directory):
    prompting = SETTINGS[1]
    tasks = benchmarks.load(['quiz'], str(directory), prompting)
    found = benchmarks.run(restored, tasks, prompting=prompting)
    scores = [direct(before, after) for before, after in pairs(prompting)]
    hits, start = [], 0
    for quiz in task_files.QUIZ:
        own = scores[start : start + len(quiz['choices'])]
        start += len(own)
        hits.append(np.argmax(own) == quiz['answer'])
    assert found['results']['quiz']['acc,none'] == np.mean(hits)
    model = harness.HarnessModel(restored, apply_chat_template=True)
    context = model.apply_chat_template([{'role': 'user', 'content': 'alpha'}])
    ((score, _),) = model.loglikelihood(requests('loglikelihood', (context, 'beta')))
    expected = direct(BOS + b'[user]alpha' + BOS + b'[assistant]', b'beta')
    np.testing.assert_allclose(score, expected, rtol=1e-5)


def direct(before: bytes, after: bytes) -> float:
    """ln p(after | before)."""
    each = scores_of_one.log_p((*before, *after))[len(before) - 1 : -1]
    return float(each[range(len(after)), list(after)].sum())


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i, ('t', i, 1)) for i, each in enumerate(arguments)]


def test_names_of_special_tokens_are_text_in_messages_and_in_what_follows(restored):
    model = harness.HarnessModel(restored, apply_chat_template=True)
    context = model.apply_chat_template([{'role': 'user', 'content': 'a<|bos|>'}])
    before, after = model._encode_pair(context, '<|eos|>')
    assert bytes(before) == BOS + b'[user]a<|bos|>' + BOS + b'[assistant]'
    assert bytes(after) == b'<|eos|>'
    assert bytes(model.tok_encode('<|eos|>', add_special_tokens=False)) == b'<|eos|>'
    plain = harness.HarnessModel(restored)
    assert bytes(plain.tok_encode(context)).count(BOS) == 1
    with pytest.raises(ValueError, match='apply_chat_template=True'):
        plain.apply_chat_template([])


def test_an_answer_ends_with_its_turn_and_goes_on_where_a_task_begins_it(restored, monkeypatch):
    model = harness.HarnessModel(restored, apply_chat_template=True)
    calls = []

    def continued(_, prompts, *, end_ids, **settings):
        calls.append((prompts, end_ids))
        return ['x'] * len(prompts)

    monkeypatch.setattr(harness, 'continued', continued)
    said = [{'role': 'user', 'content': 'q'}]
    begun = [*said, {'role': 'assistant', 'content': 'It is'}]
    texts = model.apply_chat_template(said), model.apply_chat_template(begun, False)
    wanted = {'until': [], 'max_gen_toks': 3}
    model.generate_until(requests('generate_until', *((text, wanted) for text in texts)))
    opened = BOS + b'[user]q' + BOS + b'[assistant]'
    prompts = {bytes(prompt) for prompts, _ in calls for prompt in prompts}
    assert prompts == {opened, opened + b'It is'}
    assert all(ends == list(BOS) for _, ends in calls)


def test_what_the_harness_keeps_prompts_under_is_of_one_template(restored, tmp_path):
    names = []
    for template in (TEMPLATE, TEMPLATE + ' '):
        tokenizer = ByteTokenizer()
        tokenizer.folder = epath.Path(tmp_path)
        (tmp_path / 'chat_template.jinja').write_text(template)
        model = harness.HarnessModel(restored._replace(tokenizer=tokenizer))
        names.append(model.tokenizer_name)
        assert model.chat_template(True) == template and model.chat_template(False) is None
    assert len(set(names)) == 2


def test_a_task_shows_no_more_examples_than_it_has(directory, tmp_path, caplog):
    load = lambda n, place=directory: benchmarks.load(['quiz'], str(place), Prompting(n))['tasks']
    with pytest.raises(UserError, match=r"num_fewshot=5, but task 'quiz' has 4 examples"):
        load(5)
    assert load(4)['quiz'].get_config('num_fewshot') == 4
    # An example is never the question itself where the split is named.
    text = (directory / 'quiz.yaml').read_text()
    (tmp_path / 'quiz.yaml').write_text(f'{text}fewshot_split: test\nnum_fewshot: 2\n')
    with pytest.raises(UserError, match=r"num_fewshot=4, but task 'quiz' has 3 examples"):
        load(4, tmp_path)
    assert load(None, tmp_path)['quiz'].get_config('num_fewshot') == 2
    assert load(0, tmp_path)['quiz'].get_config('num_fewshot') == 0
    (tmp_path / 'quiz.yaml').write_text(f'{text}num_fewshot: 0\n')
    assert load(3, tmp_path)['quiz'].get_config('num_fewshot') == 0
    assert 'quiz shows no examples, as its file says' in caplog.text


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A workdir whose checkpoint has a tokenizer and no chat template."""
    folder = tmp_path_factory.mktemp('run')
    array = checkpoint.LazyArray((3,), np.dtype('float32'), lambda: [((), np.zeros(3, 'float32'))])
    saved = {'config': dataclasses.asdict(tiny_restored.restored().config), 'tokenizer': 'bytes'}
    checkpoint.write_step(folder / 'checkpoints', 0, {'params': {'x': array}}, saved)
    (folder / 'checkpoints/tokenizer').mkdir()
    return folder


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'carries no chat template; put the chat_template.jinja of the model into'),
        (['--num_fewshot=-1'], r'num_fewshot=-1 must be 0 \(none\) or more'),
        (['--noapply_chat_template', '--nofewshot_as_multiturn'], 'add --apply_chat_template'),
        (['--tasks='], '--apply_chat_template is for --tasks'),
        (['--tasks=', '--lengths=64'], '--apply_chat_template is for --tasks'),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(
    arguments, message, run, capsys, monkeypatch
):
    monkeypatch.setattr(command, 'prepare', lambda values: None)
    monkeypatch.setattr(command, 'restore', None)
    monkeypatch.setattr(benchmarks, 'load', None)
    given = f'--checkpoint={run}', '--tasks=quiz', '--apply_chat_template', *arguments
    line = refused(capsys, 'eval', *given, alone=True)
    assert re.search(message, line), line


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize('description', ['Be quick.', '{% if question == "eta" %}Eta.{% endif %}'])
def test_a_description_that_the_template_refuses_is_found_out_before_the_weights_are_read(
    description, run, directory, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(command, 'prepare', lambda values: None)
    monkeypatch.setattr(command, 'restore', None)
    text = (directory / 'quiz.yaml').read_text()
    (tmp_path / 'quiz.yaml').write_text(f"{text}description: '{description}'\n")
    place = run / 'checkpoints/tokenizer/chat_template.jinja'
    place.write_text(NO_SYSTEM + TEMPLATE)
    given = f'--checkpoint={run}', '--tasks=quiz', f'--include_path={tmp_path}'
    line = refused(capsys, 'eval', *given, '--apply_chat_template')
    place.unlink()
    assert re.search(r"description of task 'quiz'.*by /.*/chat_template\.jinja: no system;", line)
    assert line.endswith('do without apply_chat_template.')


def test_descriptions_are_no_matter_to_a_template_that_takes_them_and_where_there_are_none(
    restored, directory, tmp_path
):
    tokenizer = ByteTokenizer()
    tokenizer.folder = epath.Path(tmp_path / 'tokenizer')
    tokenizer.folder.mkdir()
    (tokenizer.folder / 'chat_template.jinja').write_text(NO_SYSTEM + TEMPLATE)
    (tmp_path / 'quiz.yaml').write_text(
        (directory / 'quiz.yaml').read_text() + "description: '{% if answer > 9 %}x{% endif %}'\n"
    )
    for place in (directory, tmp_path):  # the second is empty for every document
        benchmarks.check_descriptions(tokenizer, benchmarks.load(['quiz'], str(place)))
    (tmp_path / 'quiz.yaml').write_text(
        (directory / 'quiz.yaml').read_text() + "description: '{{ nothing }}'\n"
    )
    with pytest.raises(UserError, match="task 'quiz' cannot be read: 'nothing' is undefined; mend"):
        benchmarks.check_descriptions(tokenizer, benchmarks.load(['quiz'], str(tmp_path)))
    described = (directory / 'quiz.yaml').read_text() + 'description: Be quick.\n'
    (tmp_path / 'quiz.yaml').write_text(described)
    tasks = benchmarks.load(['quiz'], str(tmp_path))
    benchmarks.check_descriptions(restored.tokenizer, tasks)
    chat = Prompting(apply_chat_template=True)
    with pytest.raises(UserError, match="description of task 'quiz'"):
        benchmarks.run(restored._replace(tokenizer=tokenizer), tasks, prompting=chat)


def test_a_template_beside_the_tokenizer_is_taken_and_one_without_system_messages_refused(
    run, restored, directory, capsys, monkeypatch
):
    monkeypatch.setattr(command, 'prepare', lambda values: None)
    monkeypatch.setattr(command, 'restore', lambda values: restored)
    given = [
        'eval', f'--checkpoint={run}', '--tasks=quiz', f'--include_path={directory}', '--json',
        '--apply_chat_template', '--limit=1', '--num_fewshot=1',
    ]  # fmt: skip
    place = run / 'checkpoints/tokenizer/chat_template.jinja'
    place.write_text(TEMPLATE)
    cli.main(given)
    results = json.loads(capsys.readouterr().out)
    assert results['apply_chat_template'] and results['num_fewshot'] == 1
    place.write_text(NO_SYSTEM + TEMPLATE)
    line = refused(capsys, *given, '--system_instruction=x')
    place.unlink()
    assert re.search(r'cannot be rendered by .*chat_template\.jinja: no system', line), line
