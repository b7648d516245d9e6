"""Scores of rows are those of each token by itself."""

import math

import jax
import numpy as np
import pytest
import scores_of_one
import tiny_restored
from hypothesis import given
from hypothesis import strategies as st

from helios_jax import config
from helios_jax.evaluate import scores
from helios_jax.parallel import mesh as meshes
from helios_jax.restoring import mesh_of

pytestmark = pytest.mark.usefixtures('quick_runs')

BOS = 0xFE


def direct(before, after) -> tuple[np.ndarray, np.ndarray]:
    all_of = scores_of_one.log_p((*before, *after))[len(before) - 1 : -1]
    nats = -np.take_along_axis(all_of, np.array(after)[:, None], axis=1)[:, 0]
    return nats, all_of.argmax(axis=1) == after


def pairs(*sizes):
    rng = np.random.default_rng(3)
    draw = lambda n: rng.integers(0, 250, n).tolist()
    return [([BOS, *draw(before - 1)], draw(after)) for before, after in sizes]


SIZES = [(1, 1), (5, 90), (120, 9), (33, 2)]


def close(found, wanted_pairs):
    for got, pair in zip(found, wanted_pairs, strict=True):
        nats, likeliest = direct(*pair)
        np.testing.assert_allclose(got.nats, nats, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(got.likeliest, likeliest)


@pytest.mark.slow
def test_a_batch_scores_each_token_as_it_is_by_itself():
    made = tiny_restored.restored()
    close(scores.score(made, pairs(*SIZES), scores.RowBatch([], 5, 192)), pairs(*SIZES))


def test_what_the_model_writes_greedily_is_likeliest():
    before = pairs((7, 1))[0][0]
    after = []
    for _ in range(3):
        after.append(int(scores_of_one.log_p((*before, *after))[-1].argmax()))
    (got,) = scores.score(tiny_restored.restored(), [(before, after)], scores.RowBatch([], 5, 192))
    assert got.likeliest.tolist() == [True] * 3


@pytest.mark.slow
def test_a_mesh_scores_as_one_device_does():
    made = tiny_restored.restored(8, context=4)
    shape = scores.RowBatch([], 8, 192)
    close(scores.score(made, pairs(*SIZES), shape), pairs(*SIZES))


def test_shapes_are_few_and_hold_every_row_once_the_longest_first():
    mesh = mesh_of(tiny_restored.restored().variables)
    lengths = [7, 1000, 128, 129, 400, 513, 6, 5]
    made = scores.shapes(lengths, mesh, batch_tokens=300)
    assert sorted(i for shape in made for i in shape.indices) == list(range(8))
    assert [shape.length for shape in made] == [1024, 768, 512, 192, 128, 128]
    assert [shape.num_rows for shape in made] == [1, 1, 1, 1, 2, 2]
    for shape in made:
        assert len(shape.indices) <= shape.num_rows
        assert all(lengths[i] <= shape.length for i in shape.indices)
    eight = meshes.make(config.Mesh(context=2), jax.devices())
    for shape in scores.shapes(lengths, eight, 300):
        assert (shape.num_rows % 4, shape.length % 4) == (0, 0)


@given(st.integers(0, 90), st.integers(3, 40), st.data())
def test_windows_score_each_token_once_after_all_that_fits(num_tokens, length, data):
    stride = data.draw(st.integers(1, length - 2))
    tokens = list(range(num_tokens))
    rows = list(scores.windows(tokens, BOS, length, stride))
    assert [t for _, after in rows for t in after] == tokens
    for number, (before, after) in enumerate(rows):
        assert before[0] == BOS and len(before) + len(after) <= length
        assert [*before[1:], *after] == tokens[after[-1] + 2 - len(before) - len(after) :][
            : len(before) + len(after) - 1
        ]
        if number:
            assert len(after) <= stride and len(before) + len(after) == length
    assert len(rows) == (1 + math.ceil(max(0, num_tokens - length + 1) / stride)) * bool(tokens)
