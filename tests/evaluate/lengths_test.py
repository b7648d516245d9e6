"""Figures by length are those of a computation token by token, and of prompts that are answered."""

import io
import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
import scores_of_one
import tiny_restored
from refusals import refused

from helios_jax import cli, config, restoring
from helios_jax.data.lossy import Encoded
from helios_jax.data.tokenizer import ByteTokenizer
from helios_jax.errors import UserError
from helios_jax.evaluate import command, length_report, lengths, sliding
from helios_jax.evaluate.generate import continued
from helios_jax.evaluate.length_settings import METHODS, Lengths
from helios_jax.evaluate.prompts import Prompt
from helios_jax.evaluate.responses import Responses

pytestmark = pytest.mark.usefixtures('quick_runs')

TEXT = 'What is read past the trained length must be read somehow; é counts twice. ' * 9


def encoded(num_tokens: int, start: int = 0) -> Encoded:
    (made,) = tiny_restored.restored().tokenizer.encode_with_bytes([TEXT[start:]])
    # Pairwise distinct, so that a token more or less is seen.
    num_bytes = np.arange(1, num_tokens + 1, dtype=np.uint32)
    return Encoded(made.ids[:num_tokens], num_bytes, '')


def brute_force(text: Encoded, length: int, stride: int) -> tuple[float, np.ndarray]:
    """Nats of all tokens, and of each token of the first row, a window at a time."""
    tokens, nats, first = [0xFE, *text.ids.tolist()], 0.0, np.zeros(0)
    ends = [min(length, len(tokens))]
    while ends[-1] < len(tokens):
        ends.append(min(ends[-1] + stride, len(tokens)))
    done = 1
    for end in ends:
        row = [0xFE, *tokens[max(1, end - length + 1) : end]]
        each = -scores_of_one.log_p(tuple(row))[range(len(row) - 1), row[1:]]
        nats += each[len(row) - 1 - (end - done) :].sum()
        first = each if end == ends[0] else first
        done = end
    return nats, first


def test_perplexity_is_that_of_windows_one_by_one_and_positions_add_up_to_the_whole():
    texts, length, stride = [encoded(120), encoded(100, start=7)], 90, 37
    found = sliding.perplexity(tiny_restored.restored(), texts, length, stride, 400)
    direct = [brute_force(text, length, stride) for text in texts]
    assert found['tokens'] == 220
    expected = math.exp(sum(nats for nats, _ in direct) / 220)
    np.testing.assert_allclose(found['perplexity'], expected, rtol=1e-5)
    every_byte = sum(range(121)) + sum(range(101))
    sliding_bits = 220 * math.log2(expected) / every_byte
    np.testing.assert_allclose(found['sliding_bits_per_byte'], sliding_bits, rtol=1e-5)
    bits = sum(first for _, first in direct) / math.log(2)
    num_bytes = 2 * np.arange(1, length)
    np.testing.assert_allclose(found['bits_per_byte'], bits.sum() / num_bytes.sum(), rtol=1e-5)
    ends = [(one['start'], one['end']) for one in found['positions']]
    assert ends == [(0, 64), (64, 90)]
    for (start, end), one in zip(ends, found['positions'], strict=True):
        # Position p of a row has the text's token p − 1; position 0 is BOS, which no one predicts.
        inside = slice(max(start, 1) - 1, end - 1)
        np.testing.assert_allclose(one['bits'], bits[inside].sum(), rtol=1e-5)
        assert one['bytes'] == num_bytes[inside].sum()
        np.testing.assert_allclose(one['bits_per_byte'], one['bits'] / one['bytes'], rtol=1e-9)
    assert sum(one['bytes'] for one in found['positions']) == num_bytes.sum()


def test_methods_are_settings_of_rope():
    made = tiny_restored.restored()
    trained = tiny_restored.TRAINED
    scalings = {
        'none': ('none', 1), 'pi': ('linear', 4), 'ntk': ('ntk', 1), 'yarn': ('static', 4),
        'dynamic': ('dynamic', 1),
    }  # fmt: skip
    assert scalings.keys() == METHODS.keys()
    for method, expected in scalings.items():
        rope = lengths.stretched(made, method, 4 * trained).model.model.rope
        assert (rope.scaling, rope.factor) == expected and rope.trained_length == trained
    assert lengths.stretched(made, 'yarn', trained // 2).model.model.rope.factor == 1
    other = {'model.rope.scaling': 'static', 'model.rope.attention_factor': 1.3}
    imported = made._replace(config=config.replace(made.config, other))
    for method in METHODS:
        assert (
            lengths.stretched(imported, method, 4 * trained).model.model.rope.attention_factor == 0
        )


@pytest.fixture
def corpus(tmp_path) -> str:
    (tmp_path / 'short.txt').write_text('too short')
    for number in range(3):
        (tmp_path / f'{number}.txt').write_text(f'{number} {TEXT}')
    return f'{tmp_path}/*.txt'


@pytest.fixture
def unscored(monkeypatch):
    """Prompts alone count: nothing is computed by the model."""
    figures = {'perplexity': 5.0, 'tokens': 1, 'bits_per_byte': 1.5}
    one = {'start': 0, 'end': 64, 'bits': 3.0, 'bytes': 2, 'bits_per_byte': 1.5}
    monkeypatch.setattr(lengths, 'perplexity', lambda *_: figures | {'positions': [one]})


def right(restored, prompts, batch_tokens):
    return [f'They are {" and ".join(prompt.answers)}.' for prompt in prompts]


def wrong(restored, prompts, batch_tokens):
    return ['I do not know.' for _ in prompts]


@pytest.mark.parametrize(('answer', 'expected'), [(right, 1.0), (wrong, 0.0)])
def test_a_model_that_is_right_has_all_and_one_that_never_is_has_nothing(
    answer, expected, corpus, unscored, caplog
):
    wanted = Lengths((330, 600), ('none', 'dynamic'), corpus, documents=2, trials=2, stride=100)
    results = lengths.measure(tiny_restored.restored(), wanted, answer=answer)
    assert '330 tokens are too few for niah, niah_multikey, vt, cwe, fwe: left out.' in caplog.text
    assert results['documents'] == 2 and len(results['rows']) == 4
    for row in results['rows']:
        assert set(row['passkey']) == {'0.0', '0.25', '0.5', '0.75', '1.0'}
        # A byte is a token: the other tasks do not fit.
        fitting = {330: set(), 600: {'niah', 'niah_multikey', 'vt'}}
        assert set(row['ruler']) == fitting[row['length']]
        assert set([*row['passkey'].values(), *row['ruler'].values()]) == {expected}
    table = length_report.table(results)
    assert table.count(f'{expected:.0%}') >= 8 and '–' in table
    assert '| dynamic | 600 | 5.00 | 1.5000 |' in table
    if expected == 0:
        return  # one plot will do
    png = matplotlib.image.imread(io.BytesIO(length_report.plot(results)), format='png')
    assert min(png.shape[:2]) > 500 and png[..., :3].std() > 0.02
    for left_out in (['ruler'], ['ruler', 'passkey']):  # what was not measured is not drawn
        rows = [row | {key: {} for key in left_out} for row in results['rows']]
        less = matplotlib.image.imread(io.BytesIO(length_report.plot(results | {'rows': rows})))
        assert (less.shape[0] < 0.6 * png.shape[0]) == (len(left_out) == 2)


@pytest.mark.parametrize('method', METHODS)
def test_a_model_that_learnt_longer_rows_with_static_yarn_is_stretched_by_every_method(method):
    made = tiny_restored.restored()
    rope = {'model.rope.scaling': 'static', 'model.rope.factor': 4.0, 'data.row_length': 4 * 64}
    learnt = made._replace(config=config.replace(made.config, rope))
    found = lengths.stretched(learnt, method, 320).model.model.rope
    assert found == lengths.stretched(made, method, 320).model.model.rope
    assert found.trained_length == 64


@pytest.mark.slow
def test_prompts_of_a_batch_are_continued_as_each_by_itself():
    made = tiny_restored.restored()
    prompts = [Prompt([0xFE, *range(10, 10 + n)], ('x',), n - 3) for n in (6, 5, 7)]
    texts = lengths.greedy(made, prompts, batch_tokens=300)
    for prompt, text in zip(prompts, texts, strict=True):
        settings = {'max_tokens': prompt.room, 'temperature': 0.0}
        (alone,) = continued(made, [prompt.tokens], **settings)
        assert text[: len(alone)] == alone and len(alone) > 0


@pytest.mark.slow
def test_the_command_measures_and_writes(corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, 'restore', lambda values: tiny_restored.restored())
    monkeypatch.setattr(command, 'prepare', lambda values: None)
    monkeypatch.setattr(restoring, 'read_metadata', lambda *_: {})
    arguments = ['eval', '--checkpoint=a_run', '--lengths=64,150', f'--text={corpus}']
    arguments += [
        '--methods=none,dynamic',
        '--stride=60',
        '--trials=0',
        '--documents=1',
        f'--output={tmp_path}/out',
    ]
    cli.main([*arguments, '--json'])
    results = json.loads(capsys.readouterr().out)
    assert [(row['method'], row['length']) for row in results['rows']] == [
        (method, length) for method in ('none', 'dynamic') for length in (64, 150)
    ]
    # No method changes anything within the trained length; beyond it this one does.
    within, beyond = (
        [row['perplexity'] for row in results['rows'] if row['length'] == n] for n in (64, 150)
    )
    assert np.ptp(within) < 1e-4 and len(set(beyond)) == 2
    assert json.loads((tmp_path / 'out' / 'lengths.json').read_text()) == results
    assert (tmp_path / 'out' / 'lengths.png').stat().st_size > 10_000
    table = (tmp_path / 'out' / 'lengths.md').read_text()
    assert table == length_report.table(results) + '\n'


class StoppedError(Exception):
    """An evaluation ends here."""


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_goes_on_and_scores_no_row_twice(corpus, tmp_path):
    made, asked = tiny_restored.restored(), []
    methods = ('none', 'dynamic')
    wanted = Lengths((64, 100), methods, corpus, documents=2, trials=0, stride=40, batch_rows=2)
    score, add = sliding.score, Responses.add

    def scored(restored, pairs, shape):
        rope = restored.model.model.rope.scaling
        asked.extend((rope, *map(tuple, pair)) for pair in pairs)
        return score(restored, pairs, shape)

    def add_and_stop(self, answers):
        add(self, answers)
        if len(asked) > 7:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliding, 'score', scored)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Responses, 'add', add_and_stop)
            with pytest.raises(StoppedError):
                lengths.measure(made, wanted, output=tmp_path / 'a')
        before = len(asked)
        resumed = lengths.measure(made, wanted, output=tmp_path / 'a')
        assert 7 < before < len(asked) and len(set(asked)) == len(asked)
        assert lengths.measure(made, wanted, output=tmp_path / 'a') == resumed
        assert len(set(asked)) == len(asked)
    assert lengths.measure(made, wanted) == resumed


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--lengths=64,x'], "--lengths: 'x' is no number"),
        (['--lengths=512', '--methods=none,yarm'], "--methods='yarm' is not one of .*'yarn'"),
        (['--lengths=512', '--methods='], '--methods is empty'),
        (['--lengths=200'], '--lengths has 200, which must be at least --stride=256 and two more'),
        (['--lengths=512', '--stride=0'], '--stride=0 must be above 0'),
        (['--lengths=512', '--trials=-1'], '--trials=-1 must be 0'),
        (['--lengths=512', '--tasks=x'], '--tasks and --lengths are two evaluations'),
        (['--lengths=512', '--yarn=dynamic'], '--yarn stretches positions as --methods do'),
        (['--lengths=512,512'], r'--lengths names one twice: \(512, 512\); name it once'),
        (['--lengths=512', '--rows=3'], '--rows means nothing to --lengths; leave it out'),
        (['--output=x'], '--output is for --tasks and --lengths'),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, capsys):
    line = refused(capsys, 'eval', '--checkpoint=nowhere', *arguments)
    assert re.search(message, line), line


def test_a_corpus_without_a_long_document_is_refused(corpus):
    source = (tiny_restored.restored().config.data, ByteTokenizer())
    with pytest.raises(UserError, match=r'no document of --text=\S+ has the 5000 tokens of the lo'):
        lengths.long_documents(*source, Lengths((512, 5000), text=corpus))
    texts = lengths.long_documents(*source, Lengths((512,), text=corpus))
    assert [(len(text.ids), len(text.num_bytes)) for text in texts] == [(511, 511)] * 3


class LosingTokenizer(ByteTokenizer):
    def encode_with_bytes(self, texts):
        return [made._replace(kept=made.kept[1:]) for made in super().encode_with_bytes(texts)]


def test_a_tokenizer_that_loses_text_is_refused_unless_it_is_allowed(corpus):
    source = (tiny_restored.restored().config.data, LosingTokenizer())
    with pytest.raises(UserError, match=r'loses some of --text=.*--allow_lossy_tokenizer'):
        lengths.long_documents(*source, Lengths((512,), text=corpus))
    allowed = Lengths((512,), text=corpus, allow_lossy_tokenizer=True)
    assert len(lengths.long_documents(*source, allowed)) == 3
