"""Generation with the cache is recomputation, whatever the chunks, the batch and the mesh."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from random_weights import random_weights

from helios_jax import config
from helios_jax.data.tokenizer import ByteTokenizer
from helios_jax.errors import UserError
from helios_jax.evaluate import decoding
from helios_jax.evaluate import generate as generating
from helios_jax.evaluate.decoding import prefill
from helios_jax.evaluate.generate import compile_ahead, complete, generate, sample
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import compiler_options, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.restoring import Restored, mesh_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

TRAINED, LENGTH = 16, 56  # tokens; more than 3 × the trained length
SMALL_CACHE = 16  # slots: one that is doubled twice for LENGTH tokens
NO_EOS = 999
PATTERNS = {'full': 'dense', 'mixed': 'dense,dense_window,moe'}


@functools.cache
def model_of(pattern: str) -> Transformer:
    """Three layers with convex GMUs and dynamic YaRN, in float32; mixed ones add the embedding."""
    cfg = config.Config(
        model=config.Model(
            vocab_size=256, num_layers=3, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16,
            mlp_dim=48, period=PATTERNS[pattern], window=11, qk_norm=True,
            compute_dtype='float32', rope=config.Rope(scaling='dynamic', trained_length=TRAINED),
            moe=config.MoE(num_experts=4, num_experts_per_token=2, mlp_dim=24),
            gmu=config.GMU(embedding='on' if pattern == 'mixed' else 'off'),
            value_residual=pattern == 'mixed',
        ),
        data=config.Data(row_length=TRAINED),
    )  # fmt: skip
    return Transformer(cfg.model)


@functools.cache
def variables_of(pattern: str):
    """Random weights in which no gate, scale or bias is at its start."""
    return random_weights(abstract_variables(model_of(pattern)), seed=11)


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 250, LENGTH).astype(np.int32)


@functools.cache
def recompute(pattern: str):
    """[B, LENGTH] tokens to all logits, without a cache."""
    model = model_of(pattern)
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]

    @jax.jit
    def logits(variables, rows):
        where = jnp.broadcast_to(positions, rows.shape)
        return model.apply(variables, rows, where, None, method='logits')

    return lambda rows: np.asarray(logits(variables_of(pattern), jnp.asarray(rows, jnp.int32)))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ('pattern', 'chunk'),
    [
        slow('full', 7),
        *(slow('full', 1), ('full', LENGTH)),
        *(slow('mixed', 1), slow('mixed', 7), slow('mixed', LENGTH)),
    ],
)
def test_prefill_in_chunks_is_the_plain_computation(pattern, chunk):
    whole = recompute(pattern)(tokens()[None])[0]
    assert np.std(whole[:, :256]) > 0.3
    for length in {7, TRAINED, TRAINED + 1, 2 * TRAINED + 1, LENGTH} if chunk != 1 else {LENGTH}:
        logits, _ = prefill(
            model_of(pattern), variables_of(pattern), [tokens()[:length].tolist()], chunk
        )
        close(logits[0, :256], whole[length - 1, :256])
        assert np.isneginf(np.asarray(logits[0, 256:])).all()


@pytest.fixture
def growing_cache(monkeypatch):
    monkeypatch.setattr(decoding, 'SMALLEST_CACHE', SMALL_CACHE)


@pytest.mark.parametrize('pattern', [slow('full'), slow('mixed')])
def test_decoding_is_recomputation_at_every_length_and_across_every_boundary(
    pattern, growing_cache
):
    model, variables = model_of(pattern), variables_of(pattern)
    whole = recompute(pattern)(tokens()[None])[0]
    start = 5
    logits, cache = prefill(model, variables, [tokens()[:start].tolist()], 16)
    for t in range(start, LENGTH):
        close(logits[0, :256], whole[t - 1, :256])
        column = lambda x: np.full((1, 1), x, np.int32)
        cache = decoding.with_room(cache, t + 1)
        logits, cache = decoding.extending(compiler_options.DECODING)(
            variables, cache, column(tokens()[t]), column(t), column(1), model=model
        )
    close(logits[0, :256], whole[-1, :256])
    assert decoding.num_slots(cache) == 4 * SMALL_CACHE


@pytest.mark.slow
@pytest.mark.parametrize('pattern', PATTERNS)
def test_greedy_tokens_are_those_of_recomputation_for_ragged_prompts(pattern, growing_cache):
    lengths = (3, 14, 31)
    prompts = [
        tokens()[start : start + n].tolist() for start, n in zip((0, 5, 9), lengths, strict=True)
    ]
    count = LENGTH - max(lengths)
    made = generate(
        model_of(pattern), variables_of(pattern), prompts,
        max_tokens=count, eos_id=NO_EOS, temperature=0.0,
    )  # fmt: skip
    rows = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt)] = prompt
    for step in range(count):
        logits = recompute(pattern)(rows)
        for row, n in enumerate(lengths):
            expected = int(logits[row, n + step - 1].argmax())
            assert made[row][step] == expected, (row, step)
            rows[row, n + step] = expected
    # What shares the batch changes nothing.
    alone = generate(
        model_of(pattern), variables_of(pattern), prompts[1:2],
        max_tokens=count, eos_id=NO_EOS, temperature=0.0,
    )  # fmt: skip
    assert alone == made[1:2]


def drawn(variables):
    prompts = [tokens()[:3].tolist(), tokens()[5:24].tolist(), tokens()[9:19].tolist()]
    return generate(
        model_of('mixed'), variables, prompts,
        max_tokens=20, eos_id=NO_EOS, temperature=0.9, top_k=50, seed=4,
    )  # fmt: skip


@pytest.mark.slow
def test_a_mesh_generates_what_one_device_does(growing_cache):
    model, variables = model_of('mixed'), variables_of('mixed')
    expected = drawn(variables)
    mesh = meshes.make(config.Mesh(fsdp=1, expert=2, context=2, tensor=2))
    boxed = abstract_variables(model)
    where = sharding.tree_shardings(mesh, sharding.logical_axes(boxed), nn.unbox(boxed))
    with jax.set_mesh(mesh):
        assert drawn(jax.device_put(variables, where)) == expected


def short(prompts=((1, 2, 3), (4, 5)), **settings):
    settings = {'max_tokens': 6, 'eos_id': NO_EOS, 'temperature': 0.0} | settings
    return generate(model_of('full'), variables_of('full'), [list(p) for p in prompts], **settings)


def test_a_row_ends_before_eos_and_the_others_go_on():
    free = short()
    eos = free[0][3]
    cut = [row[: row.index(eos)] if eos in row else row for row in free]
    assert len(cut[0]) <= 3
    assert short(eos_id=eos) == cut
    assert short(end_ids=[eos]) == cut


def test_a_row_ends_where_it_is_told_to():
    free = short()
    made = short(stopped=lambda row, tokens: row == 1 and len(tokens) == 2)
    assert made == [free[0], free[1][:2]]


def test_seeds_repeat_and_differ():
    draws = [short(temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != short([(1, 2, 3)], temperature=0.0)[0]


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'prompts': [[1], []]}, 'prompt'),
        ({'max_tokens': 0}, 'max_tokens=0'),
        ({'temperature': -0.5}, r'temperature=-0\.5'),
        ({'top_p': 0.0}, r'top_p=0\.0'),
        ({'top_p': 1.5}, r'top_p=1\.5'),
        ({'top_k': -1}, 'top_k=-1'),
        ({'temperature': float('inf')}, 'temperature=inf'),
        ({'temperature': float('nan')}, 'temperature=nan'),
        ({'seed': 10**20}, f'seed={10**20} must lie between -2147483648 and'),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        short(**settings)


LOGITS = np.log([0.4, 0.05, 0.25, 0.2, 0.1])


def frequencies(**settings) -> np.ndarray:
    """How often each of five tokens is drawn."""
    count = 20_000
    settings = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0} | settings
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (count, 5))
    drawn = np.asarray(sample(logits, jax.random.key(0), **settings))
    return np.bincount(drawn, minlength=5) / count


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({}, [0.4, 0.05, 0.25, 0.2, 0.1]),
        ({'temperature': 0.5}, np.square([0.4, 0.05, 0.25, 0.2, 0.1])),
        ({'temperature': 0.0}, [1, 0, 0, 0, 0]),
        ({'top_k': 1}, [1, 0, 0, 0, 0]),
        ({'top_k': 3}, [0.4, 0, 0.25, 0.2, 0]),
        ({'top_k': 9}, [0.4, 0.05, 0.25, 0.2, 0.1]),
        ({'top_p': 0.3}, [1, 0, 0, 0, 0]),  # the first alone reaches it
        ({'top_p': 0.6}, [0.4, 0, 0.25, 0, 0]),
        ({'top_p': 0.86}, [0.4, 0, 0.25, 0.2, 0.1]),
        ({'top_p': 0.6, 'top_k': 2}, [0.4, 0, 0, 0, 0]),  # 0.4 of 0.65 is more than 0.6
        ({'top_p': 0.6, 'temperature': 2.0}, np.sqrt([0.4, 0, 0.25, 0.2, 0])),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_that_the_settings_leave(settings, expected):
    expected = np.asarray(expected, float) / np.sum(expected)
    drawn = frequencies(**settings)
    np.testing.assert_allclose(drawn, expected, atol=0.015)
    assert not drawn[expected == 0].any()


@functools.cache
def restored(pattern: str = 'full') -> Restored:
    one = NamedSharding(meshes.make(config.Mesh(), jax.devices()[:1]), PartitionSpec())
    variables = jax.tree.map(lambda x: jax.device_put(x, one), variables_of(pattern))
    cfg = config.Config(model=model_of(pattern).model, data=config.Data(row_length=TRAINED))
    return Restored(model_of(pattern), variables, ByteTokenizer(), cfg)


@pytest.mark.slow
def test_texts_are_cut_before_the_first_stop_text_and_continue_their_prompts():
    tokenizer = ByteTokenizer()
    prompts = ['ab', 'xyz w']
    free = complete(restored(), prompts, max_tokens=8, temperature=0.0)
    with jax.set_mesh(mesh_of(restored().variables)):
        ids = generate(
            restored().model, restored().variables,
            [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts],
            max_tokens=8, eos_id=tokenizer.eos_id, temperature=0.0,
        )  # fmt: skip
    assert free == [tokenizer.decode(row) for row in ids]
    stop = [free[0][3:5], free[1][2]]
    assert all(stop)
    made = complete(restored(), prompts, max_tokens=8, temperature=0.0, stop=stop)
    for text, before in zip(made, free, strict=True):
        first = min(before.find(end) for end in stop if end in before)
        assert text == before[:first]


def test_a_stop_text_that_is_empty_is_refused():
    with pytest.raises(UserError, match='stop is empty'):
        complete(restored(), ['a'], stop=[''], max_tokens=1)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int]]:
    """Tokens read and slots attended to, of each call of the model, which computes nothing."""
    made: list[tuple[int, int]] = []
    real = decoding.extend

    def extend(variables, cache, tokens, *args, **settings):
        made.append((tokens.shape[1], decoding.num_slots(cache)))
        computed = functools.partial(real, **settings)
        shapes = jax.eval_shape(computed, variables, cache, tokens, *args)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    for module in (decoding, generating):
        monkeypatch.setattr(module, 'extending', lambda program: extend)
    return made


def test_two_programs_serve_every_length(calls):
    short([tokens()[:20].tolist()], max_tokens=3)
    short([tokens()[:31].tolist()], max_tokens=1)
    short([tokens()[:17].tolist()], max_tokens=9)
    assert set(calls) == {(32, 1024), (1, 1024)}


@pytest.mark.slow
def test_a_call_attends_to_little_more_than_what_the_cache_holds(calls, growing_cache, monkeypatch):
    monkeypatch.setattr(decoding, 'PREFILL_CHUNK', 8)
    short([tokens()[:37].tolist(), tokens()[:9].tolist()], max_tokens=33)
    prompt = [(8, 16), (8, 16), (8, 32), (8, 32), (8, 64)]
    assert calls == [*prompt, *[(1, 64)] * (64 - 37), *[(1, 128)] * 5]


@pytest.fixture
def compilations(caplog):
    """The names of the programs that were compiled, in any thread, since it was last asked."""

    def names() -> list[str]:
        found = re.findall(r'Finished XLA compilation of jit\((\w+)\)', caplog.text)
        caplog.clear()
        return sorted(found)

    jax.config.update('jax_log_compiles', True)  # jax.log_compiles() sees its own thread alone
    yield names
    jax.config.update('jax_log_compiles', False)


@pytest.mark.slow
def test_what_was_compiled_ahead_is_not_compiled_again(compilations):
    of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    early = restored()._replace(variables=jax.tree.map(of, restored().variables))
    prompts = ['a', 'be', 'sea', 'deed', 'eagle']
    settings = {'max_tokens': 3, 'temperature': 0.7, 'top_k': 6, 'seed': 2}
    compilations()
    compile_ahead(early, prompts, **settings)
    assert compilations() == ['draw', 'empty_cache', 'extend', 'extend']
    complete(restored(), prompts, **settings)
    assert compilations() == []
    with pytest.raises(UserError, match='top_k=-3'):
        compile_ahead(early, prompts, max_tokens=1, top_k=-3)


@pytest.mark.slow
def test_ahead_on_several_devices_the_program_for_prompts_is_compiled(compilations):
    mesh = meshes.make(config.Mesh(fsdp=2), jax.devices()[:2])
    where = NamedSharding(mesh, PartitionSpec())
    of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    early = restored()._replace(variables=jax.tree.map(of, restored().variables))
    compilations()
    compile_ahead(early, ['a', 'b', 'c'], max_tokens=3)
    assert compilations() == ['empty_cache', 'extend']


def warnings(caplog, monkeypatch, prompt, max_tokens, **rope) -> list[str]:
    monkeypatch.setattr(generating, 'generate', lambda *_, **__: [[]])
    model = config.replace(model_of('full').model, {f'rope.{n}': v for n, v in rope.items()})
    caplog.clear()
    complete(restored()._replace(model=Transformer(model)), [prompt], max_tokens=max_tokens)
    return [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']


def test_a_text_that_reaches_past_the_trained_length_is_warned_of(caplog, monkeypatch):
    warned = functools.partial(warnings, caplog, monkeypatch)
    (line,) = warned('a' * 12, 4, scaling='none')  # and BOS
    assert re.search(r'13 tokens.*max_tokens=4 .*past the 16 tokens.*--yarn=dynamic', line)
    assert not warned('a' * 11, 4, scaling='none')
    assert not warned('a' * 12, 4, scaling='dynamic')
    assert not warned('a' * 12, 4, scaling='static', factor=2.0)
    assert warned('a' * 12, 20, scaling='static', factor=2.0)
