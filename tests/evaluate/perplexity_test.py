import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_weights

from helios_jax import config
from helios_jax.data.pipeline import Batch
from helios_jax.errors import UserError
from helios_jax.evaluate.perplexity import evaluate
from helios_jax.model.transformer import Transformer, abstract_variables

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, T, V, EOS = 5, 12, 300, 7


@functools.cache
def model_and_variables():
    model = config.Model(
        vocab_size=V, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=6,
        mlp_dim=20, prefix='dense', period='moe', compute_dtype='float32',
        moe=config.MoE(num_experts=3),
    )  # fmt: skip
    transformer = Transformer(model)
    return transformer, random_weights(abstract_variables(transformer))


def batch(seed: int = 0) -> Batch:
    """Two segments a row, each but one ending with EOS, and padding of every length."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((B, T), np.int32)
    made = Batch(rows, rows.copy(), rows.copy(), np.ones((B, T), bool), np.zeros(B, np.int32))
    for row in range(B):
        cut, end = 4 + row % 3, T - row
        made.tokens[row, :end] = rng.integers(8, V, end)
        for segment, (a, b) in enumerate(((0, cut), (cut, end)), start=1):
            made.segment_ids[row, a:b] = segment
            made.positions[row, a:b] = np.arange(b - a)
            made.tokens[row, b - 1] = EOS if (row, segment) != (1, 2) else 9
        made.num_bytes[row] = 3 * end
    return made


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def score(*batches: Batch, apart: bool = True) -> dict[str, float]:
    model, variables = model_and_variables()
    return evaluate(model, variables, map(on_device, batches), eos_id=EOS, documents_apart=apart)


@functools.cache
def apply(apart: bool):
    model, _ = model_and_variables()

    @jax.jit
    def logits(variables, batch):
        segments = batch.attention_segments(apart)
        return model.apply(variables, batch.tokens, batch.positions, segments, method='logits')

    return logits


def direct(made: Batch, apart: bool = True) -> dict[str, float]:
    """The same figures, token by token in float64 from the model's logits."""
    logits = apply(apart)(model_and_variables()[1], on_device(made))
    logits = np.asarray(logits, np.float64)[..., :V]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = text_nats = targets = 0.0
    for row in range(B):
        for t in range(T - 1):
            here, there = made.segment_ids[row, t : t + 2]
            if here and here == there and made.loss_mask[row, t + 1]:
                target = made.tokens[row, t + 1]
                nats -= log_p[row, t, target]
                text_nats -= log_p[row, t, target] if target != EOS else 0
                targets += 1
    return {
        'loss': nats / targets,
        'perplexity': math.exp(nats / targets),
        'bits_per_byte': text_nats / math.log(2) / made.num_bytes.sum(),
        'targets': targets,
        'bytes': made.num_bytes.sum(),
    }


def close(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=rtol, err_msg=name)


@pytest.mark.parametrize('apart', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_figures_are_those_of_a_direct_computation(apart):
    close(score(batch(), apart=apart), direct(batch(), apart=apart))


def test_attention_keeps_to_segments_only_where_documents_are_apart():
    assert abs(score(batch())['loss'] - score(batch(), apart=False)['loss']) > 1e-3


def test_eos_is_a_target_but_no_text():
    # What EOS costs is in the loss, and nothing of it is in the bits per byte.
    figures, expected = score(batch()), direct(batch())
    text_nats = expected['bits_per_byte'] * math.log(2) * expected['bytes']
    assert text_nats < 0.99 * expected['loss'] * expected['targets']
    np.testing.assert_allclose(figures['bits_per_byte'], expected['bits_per_byte'], rtol=1e-5)


def test_prompts_count_neither_as_targets_nor_as_text():
    masked = batch()
    masked.loss_mask[:, :3] = False
    figures = score(masked)
    close(figures, direct(masked))
    assert figures['targets'] < score(batch())['targets']


@pytest.mark.slow
def test_rows_of_padding_are_inert():
    made = batch()
    padding = Batch(*(np.zeros_like(x) for x in made))
    padded = Batch(*(np.concatenate([a, b]) for a, b in zip(made, padding, strict=True)))
    close(score(padded), score(made))
    close(score(made, padding), score(made))


def test_batches_add_up_by_their_targets_and_bytes():
    one, two = batch(1), batch(2)
    two.segment_ids[2:] = 0
    two.num_bytes[2:] = 0
    first, second, both = score(one), score(two), score(one, two)
    assert both['targets'] == first['targets'] + second['targets'] != 2 * first['targets']
    nats = sum(x['loss'] * x['targets'] for x in (first, second))
    bits = sum(x['bits_per_byte'] * x['bytes'] for x in (first, second))
    np.testing.assert_allclose(both['loss'], nats / both['targets'], rtol=1e-5)
    np.testing.assert_allclose(both['bits_per_byte'], bits / both['bytes'], rtol=1e-5)


def test_text_without_a_target_is_refused():
    made = batch()
    with pytest.raises(UserError, match='no token to predict'):
        score(made._replace(segment_ids=np.zeros_like(made.segment_ids)))
    with pytest.raises(UserError, match='no token to predict'):
        score()


def test_a_padded_vocabulary_has_no_share_of_the_probability():
    # 512 columns are stored for 300 tokens: moving the others must not matter.
    model, variables = model_and_variables()
    head = variables['params']['unembedding']['w']
    assert head.shape[1] > V
    moved = jax.tree.map(lambda x: x, variables)
    moved['params'] = variables['params'] | {'unembedding': {'w': head.at[:, V:].add(5.0)}}
    figures = evaluate(model, moved, [on_device(batch())], eos_id=EOS, documents_apart=True)
    assert figures == score(batch())
