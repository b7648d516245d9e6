"""Choices that share a context are scored as each is by itself."""

import numpy as np
import pytest
import scores_of_one
import tiny_restored

from helios_jax.evaluate import questions, scores
from helios_jax.evaluate.questions import Question, QuestionBatch
from helios_jax.restoring import mesh_of

pytestmark = pytest.mark.usefixtures('quick_runs')

BOS = 0xFE


def drawn(*sizes) -> list[Question]:
    """Questions of a context's tokens and its choices'."""
    rng = np.random.default_rng(5)
    draw = lambda n: rng.integers(0, 250, n).tolist()
    return [Question([BOS, *draw(n - 1)], [draw(own) for own in choices]) for n, *choices in sizes]


QUESTIONS = drawn((1, 3, 1), (70, 2, 17, 9), (101, 20))


def found(restored, some, batch) -> list[np.ndarray]:
    each = questions.score_choices(restored, some, batch)
    assert [len(one) for one in each] == [len(one.choices) for one in some]
    return [score for one in each for score in one]


def close(scored, some) -> None:
    pairs = [(one.context, choice) for one in some for choice in one.choices]
    for got, (before, after) in zip(scored, pairs, strict=True):
        all_of = scores_of_one.log_p((*before, *after))[len(before) - 1 : -1]
        nats = -np.take_along_axis(all_of, np.array(after)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(got.nats, nats, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(got.likeliest, all_of.argmax(axis=1) == after)


def test_each_choice_is_scored_as_it_is_by_itself():
    close(found(tiny_restored.restored(), QUESTIONS, QuestionBatch([], 5, 128, 3, 24)), QUESTIONS)


@pytest.mark.slow
def test_a_mesh_scores_as_one_device_does():
    made = tiny_restored.restored(8)
    close(found(made, QUESTIONS, QuestionBatch([], 8, 128, 4, 32)), QUESTIONS)


@pytest.mark.slow
def test_positions_that_are_stretched_go_on_behind_the_context():
    made = tiny_restored.restored(scaling='dynamic')
    alone = [(one.context, choice) for one in QUESTIONS for choice in one.choices]
    wanted = scores.score(made, alone, scores.RowBatch([], 6, 128))
    got = found(made, QUESTIONS, QuestionBatch([], 3, 128, 4, 32))
    for mine, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine.nats, other.nats, rtol=2e-5, atol=2e-5)


def test_what_shares_a_context_is_joined_where_it_saves_tokens():
    mesh = mesh_of(tiny_restored.restored().variables)
    pairs = [
        ([BOS, 1, 2], [3]), ([BOS, 9], [4]), ([BOS, 1, 2], [5, 6]), ([BOS, 1, 2], [3]),
        ([BOS, 7], list(range(100))), ([BOS, 7], [8]),  # 128 + 2 · 128 tokens, against 2 · 128
    ]  # fmt: skip
    assert questions.questions(pairs, mesh) == [
        Question([BOS, 1, 2], [[3], [5, 6]]),
        Question([BOS, 9], [[4]]),
        Question([BOS, 7], [list(range(100))]),
        Question([BOS, 7], [[8]]),
    ]
    ring = mesh_of(tiny_restored.restored(8, context=2).variables)
    assert all(len(one.choices) == 1 for one in questions.questions(pairs, ring))


def test_batches_are_of_few_shapes_and_hold_every_question_once():
    mesh = mesh_of(tiny_restored.restored().variables)
    some = drawn((5, 1, 2, 3), (300, 1, 2, 3), (7, 9, 9, 9, 1), (6, 16, 4, 4), (9, 17, 1))
    made = questions.batches(some, mesh, batch_tokens=400)
    assert made == [
        QuestionBatch([1], 1, 384, 4, 16),
        QuestionBatch([0, 2], 2, 128, 4, 16),
        QuestionBatch([3], 2, 128, 4, 16),
        QuestionBatch([4], 1, 128, 2, 32),
    ]
    eight = mesh_of(tiny_restored.restored(8).variables)
    assert all(b.num_questions % 8 == 0 for b in questions.batches(some, eight, batch_tokens=400))
