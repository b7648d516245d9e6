"""Re-expressed and upcycled models start as the model that was imported; gated ones travel."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from helios_jax import checkpoint, config
from helios_jax.convert import exporting, importing, names, tokenizers
from helios_jax.evaluate import generate
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.restoring import Restored

REASON = "needs torch and transformers: pip install 'helios_jax[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
pytest.importorskip('transformers', reason=REASON)

import hugging_face  # noqa: E402
import transformers  # noqa: E402
from hugging_face import V  # noqa: E402
from logits import load, one_device, ours, theirs  # noqa: E402
from random_weights import random_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        ('qwen3_moe', {'to_gmu': True}),
        ('qwen2', {'upcycle': (5, 2)}),
        ('llama_tied', {'upcycle': (4, 1), 'to_gmu': True}),
    ],
    ids=str,
)
def test_the_first_logits_are_those_of_the_imported_model(name, changes, tmp_path):
    made = hugging_face.model(name)
    source = hugging_face.save(made, tmp_path / 'theirs')
    tokens = hugging_face.tokens()
    imported = load(source, **changes)
    model = imported.config.model
    assert (model.gmu.kind == 'convex') == ('to_gmu' in changes)
    assert (model.gmu.kind == 'residual') != ('to_gmu' in changes)
    if 'upcycle' in changes:
        assert set(model.layer_kinds) <= {'moe', 'moe_window'}
        routers = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(imported.variables['params'])
            if 'router' in str(path)
        ]
        assert routers and all(np.asarray(router).std() > 0.05 for router in routers)
    np.testing.assert_allclose(ours(imported, tokens), theirs(made, tokens), rtol=0, atol=1e-4)


GATED = config.Model(
    vocab_size=V, num_layers=3, embed_dim=24, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=35,
    compute_dtype='float32', norm_eps=1e-3, rope=config.Rope(base=543.0, trained_length=64),
)  # fmt: skip
MODELS = {
    'default': {},
    'hydra': {
        'prefix': 'dense', 'period': 'moe_window,moe', 'window': 5, 'qk_norm': True,
        'qkv_bias': True, 'attention_softcap': 3.0, 'tied_embeddings': True,
        'moe': config.MoE(
            num_experts=4, num_experts_per_token=2, mlp_dim=20, num_shared_experts=2,
            scores='sigmoid', scale=1.5,
        ),
        'gmu': config.GMU(gate_input='both', rank=3),
        'rope': config.Rope(base=543.0, trained_length=5, scaling='dynamic'),
    },
    'additive': {
        'gmu': config.GMU(
            kind='additive', gate='full', bias='-1', normalize_output='on', embedding='on',
        ),
    },
    'residual': {
        'gmu': config.GMU(kind='residual', stream_scale='on', dwa='2x1'),
        'norm_scale': 'depth', 'qkv_bias': True, 'value_residual': True,
    },
    'ntk': {
        'rope': config.Rope(base=543.0, trained_length=5, scaling='ntk', factor=2.0),
        'gmu': config.GMU(gate='scalar', gate_input='output'),
    },
    'per_head': {'head_dim': 4, 'gmu': config.GMU(kind='highway', gate='per_head')},
    'static': {
        'rope': config.Rope(
            base=543.0, trained_length=5, scaling='static', factor=4.0, ramp='linear_in_rotations',
            attention_factor=1.2,
        ),
        'gmu': config.GMU(gate='static'),
    },
}  # fmt: skip


def exported(name, directory):
    """A model whose every weight and balance bias is random, and what was exported of it."""
    model = dataclasses.replace(GATED, **MODELS[name])
    cfg = config.replace(config.Config(), {'model': model, 'data.row_length': 4})
    module = Transformer(model)
    variables = random_weights(abstract_variables(module))
    directory.mkdir()
    hugging_face.write_tokenizer(directory, V)
    files = tokenizers.read(epath.Path(directory), V, {})
    restored = Restored(module, variables, files.tokenizer, cfg)
    settings = {'origin': {}, 'dtype': 'float32', 'shard_bytes': 20_000}
    assert exporting.write(restored, files.contents, directory / 'out', **settings) == 'helios'
    return restored, their_model(directory / 'out')


def their_model(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in MODELS if name != 'default'])
def test_an_exported_model_has_our_logits_and_comes_back(name, tmp_path):
    restored, model = exported(name, tmp_path / 'x')
    tokens = hugging_face.tokens()
    expected = ours(restored, tokens)
    assert expected.std() > 0.1
    np.testing.assert_allclose(theirs(model, tokens), expected, rtol=0, atol=1e-4)
    again = load(tmp_path / 'x/out')
    assert again.config.model == restored.config.model
    for mine, other in zip(
        jax.tree.leaves(restored.variables), jax.tree.leaves(again.variables), strict=True
    ):
        # Rows beyond the vocabulary are not exported; no other size is as large as V.
        kept = tuple(slice(0, V) for _ in mine.shape)
        np.testing.assert_allclose(other[kept], mine[kept], rtol=1e-6)


KINDS = [
    *itertools.product(
        ('convex', 'additive', 'highway'), ('low_rank', 'full', 'per_head', 'scalar', 'static')
    ),
    ('layerscale', 'low_rank'),
    ('rezero', 'low_rank'),
]
SLOW = {('layerscale', 'low_rank'), ('rezero', 'low_rank'), ('additive', 'scalar')}


@pytest.mark.parametrize(
    ('kind', 'gate'),
    [
        pytest.param(*each, marks=pytest.mark.slow if each in SLOW else pytest.mark.long)
        for each in KINDS
    ],
    ids=str,
)
def test_every_kind_and_gate_has_our_logits(kind, gate, tmp_path, monkeypatch):
    both = 'input' if kind == 'highway' else 'both'
    for normalizes in ('on', 'off') if (kind, gate) not in SLOW else ('auto',):
        gmu = config.GMU(kind=kind, gate=gate, gate_input=both, normalize_output=normalizes)
        monkeypatch.setitem(MODELS, 'this', {'num_layers': 2, 'head_dim': 8, 'gmu': gmu})
        restored, model = exported('this', tmp_path / normalizes)
        tokens = hugging_face.tokens()
        expected = ours(restored, tokens)
        assert expected.std() > 0.1
        np.testing.assert_allclose(theirs(model, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_greedy_generation_is_ours(tmp_path):
    """Prompts are padded on the left, and go past the trained length, with a cache and without."""
    restored, model = exported('hydra', tmp_path / 'x')
    prompts = [[5, 17, 23, 40, 9, 31], [12, 7, 33]]
    with jax.set_mesh(one_device()):
        expected = generate.generate(
            restored.model, restored.variables, prompts, max_tokens=12, eos_id=-1, temperature=0.0
        )
    padded = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (6 - len(p)) + [1] * len(p) for p in prompts])
    for use_cache in (True, False):
        got = model.generate(
            padded, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert got[:, 6:].tolist() == expected
    assert len({token for row in expected for token in row}) > 4


@pytest.mark.parametrize(
    'name',
    [
        pytest.param('default', marks=pytest.mark.slow),
        pytest.param('hydra', marks=pytest.mark.long),
    ],
)
def test_gradients_and_three_steps_of_training_are_ours(name, tmp_path):
    restored, model = exported(name, tmp_path / 'x')
    tokens, rate = hugging_face.tokens(), 0.005
    positions = jnp.tile(jnp.arange(tokens.shape[1])[None], (len(tokens), 1))
    inputs = jnp.asarray(tokens, jnp.int32)

    def loss(params):
        variables = restored.variables | {'params': params}
        logits = restored.model.apply(variables, inputs, positions, method='logits')
        log = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log, inputs[:, 1:, None], axis=-1).mean()

    step = jax.jit(jax.value_and_grad(loss))
    params = restored.variables['params']
    pieces = [
        piece
        for piece in names.pieces(restored.config.model, 'helios')
        if not piece.weight.name.startswith(names.ROUTER)
    ]
    model.train()
    theirs_by_name = dict(model.named_parameters())
    for _ in range(3):
        value, gradients = step(params)
        model.zero_grad()
        out = model(torch.tensor(tokens), labels=torch.tensor(tokens))
        out.loss.backward()
        np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
        flat = importing.flatten_dict(jax.device_get(gradients), sep='.')
        for piece in pieces:
            # A gradient goes the other way through the factor between theirs and ours.
            mine = piece.to_theirs(flat[piece.weight.name][piece.place]) * piece.factor**2
            got = theirs_by_name[piece.name].grad
            got = np.zeros(piece.shape) if got is None else got.numpy()
            scale = max(np.abs(mine).max(), 1e-3)
            np.testing.assert_allclose(got, mine, rtol=0, atol=2e-4 * scale, err_msg=piece.name)
        with torch.no_grad():
            for piece in pieces:
                parameter = theirs_by_name[piece.name]
                if parameter.grad is not None:
                    # Ours moves by rate · its gradient; theirs by what that is in theirs.
                    parameter -= rate / piece.factor**2 * parameter.grad
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
    final = restored._replace(variables=restored.variables | {'params': params})
    np.testing.assert_allclose(theirs(model.eval(), tokens), ours(final, tokens), atol=1e-4)


@pytest.mark.slow
def test_a_byte_tokenizer_travels(tmp_path):
    model = dataclasses.replace(GATED, vocab_size=256)
    module = Transformer(model)
    variables = random_weights(abstract_variables(module))
    run = tmp_path / 'run'
    cfg = dataclasses.asdict(config.Config(model=model))
    writer = checkpoint.Checkpoints(run / 'checkpoints', keep=1)
    writer.save(1, variables, {'config': cfg, 'tokenizer': 'bytes', 'tokenizer_files': {}})
    writer.close()
    exporting.export(run, tmp_path / 'out')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    text = 'Grüße þ ÿ, 世界\n\tx'
    assert tokenizer(text, add_special_tokens=False)['input_ids'] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (254, 255)
    said = json.loads((tmp_path / 'out/config.json').read_text())
    assert (said['bos_token_id'], said['eos_token_id']) == (254, 255)
    assert load(tmp_path / 'out').tokenizer.encode(text) == list(text.encode())
