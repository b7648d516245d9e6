"""What a directory can hold that it should not is refused by name, before memory is taken."""

import json
import pathlib
import struct

import hugging_face
import numpy as np
import pytest
from hugging_face import CONFIG, D, F, L, V, random_tensors
from refusals import refused
from safetensors.numpy import load_file, save_file

from helios_jax import config
from helios_jax.convert import exporting, importing, workdir
from helios_jax.convert.tensors import Tensors
from helios_jax.data.tokenizer import ByteTokenizer
from helios_jax.errors import UserError
from helios_jax.model.transformer import Transformer
from helios_jax.restoring import Restored

INDEX = 'model.safetensors.index.json'
EMBED = 'model.embed_tokens.weight'
STREAMS = "gmu.kind='hyper' has no Hugging Face form"


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
    """A whole checkpoint in two files."""
    found = random_tensors(CONFIG)
    half = len(found) // 2
    files = {
        'model-1.safetensors': dict(list(found.items())[:half]),
        'model-2.safetensors': dict(list(found.items())[half:]),
    }
    for file, content in files.items():
        save_file(content, tmp_path / file)
    places = {name: file for file, content in files.items() for name in content}
    (tmp_path / INDEX).write_text(json.dumps({'weight_map': places}))
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    hugging_face.write_tokenizer(tmp_path, V)
    return tmp_path


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    """`open_directory` reads headers alone; a test that loads takes this away."""

    def read(*_):
        raise AssertionError('a tensor was read')

    monkeypatch.setattr(Tensors, 'read', read)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_directory_is_opened_without_reading_a_weight(source):
    opened = importing.open_directory(source)
    assert opened.family == 'qwen2'
    assert len(opened.pieces) == 3 + L * 12


@pytest.mark.parametrize(
    'file',
    ['../model-1.safetensors', '/etc/passwd', 'a/model.safetensors', '..', 'model-1.bin',
     'model\n.safetensors', 'C:\\x.safetensors', ''],
)  # fmt: skip
def test_an_index_names_files_beside_it(source, file):
    places = json.loads((source / INDEX).read_text())['weight_map']
    change(source / INDEX, weight_map=places | {EMBED: file})
    with pytest.raises(UserError, match=r'names file .* beside the index'):
        importing.open_directory(source)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"weight_map": [1]}', 'weight_map must map'),
        ('{"weight_map": {"a": 3}}', 'weight_map must map'),
        ('{}', 'weight_map must map'),
        ('[' * 100_000, 'is no JSON'),
        ('{"weight_map": {"a": "absent.safetensors"}}', 'which is not there'),
        ('{"weight_map": {"a": "model-1.safetensors"}}', 'places in'),
    ],
    ids=range(6),
)
def test_an_index_of_another_form_is_refused(source, content, message):
    (source / INDEX).write_text(content)
    with pytest.raises(UserError, match=message):
        importing.open_directory(source)


def test_an_index_that_places_a_tensor_elsewhere_is_refused(source):
    places = json.loads((source / INDEX).read_text())['weight_map']
    change(source / INDEX, weight_map=places | {'phantom': 'model-2.safetensors'})
    with pytest.raises(UserError, match=r"places tensor 'phantom' in model-2.*which lacks it"):
        importing.open_directory(source)
    change(source / INDEX, weight_map=places | {EMBED: 'model-2.safetensors'})
    with pytest.raises(UserError, match=r'model-1\.safetensors has tensor .*embed_tokens'):
        importing.open_directory(source)


def rewrite(path, changes):
    """Changes the tensors of one file; None takes one away."""
    found = load_file(path) | changes
    save_file({name: x for name, x in found.items() if x is not None}, path)


def single(source):
    """Moves all tensors to one file, without an index."""
    (source / INDEX).unlink()
    found = load_file(source / 'model-1.safetensors') | load_file(source / 'model-2.safetensors')
    save_file(found, source / 'model.safetensors')
    return source / 'model.safetensors'


NORM = 'model.norm.weight'
BIAS = 'model.layers.1.self_attn.k_proj.bias'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({NORM: None}, f'lacks tensor {NORM}'),
        ({BIAS: None}, f'lacks tensor {BIAS}'),
        ({NORM: np.ones(D + 1, np.float32)}, rf'{NORM} has shape \[43\], but \[42\] by config'),
        ({NORM: np.ones(D, np.int32)}, f'{NORM} is of type I32'),
        ({'model.layers.1.self_attn.o_proj.bias': np.ones(D, np.float32)}, 'no model of its'),
        ({'model.layers.3.mlp.up_proj.weight': np.ones((F, D), np.float32)}, 'no model of its'),
    ],
    ids=range(6),
)
def test_tensors_that_config_contradicts_are_named(source, changes, message):
    rewrite(single(source), changes)
    with pytest.raises(UserError, match=message):
        importing.open_directory(source)


def header(path):
    content = path.read_bytes()
    (size,) = struct.unpack('<Q', content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(path, described, data):
    text = json.dumps(described).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


@pytest.mark.parametrize(
    'lie',
    [
        {'shape': [2**40, 2**40]},
        {'shape': [2**62]},
        {'shape': [-1, 3]},
        {'dtype': 'F64'},
        {'dtype': 'pickle'},
        {'data_offsets': [0, 2**60]},
        {'data_offsets': [8, 4]},
    ],
    ids=str,
)
def test_sizes_that_lie_are_refused_before_memory_is_taken(source, lie):
    path = single(source)
    described, data = header(path)
    described[NORM] |= lie
    write_header(path, described, data)
    with pytest.raises(UserError, match=r'model\.safetensors cannot be read as safetensors'):
        importing.open_directory(source)


@pytest.mark.parametrize('content', [b'', b'{}', struct.pack('<Q', 2**62) + b'{}', b'\x80\x04K.'])
def test_what_is_no_safetensors_file_is_refused(source, content):
    single(source).write_bytes(content)
    with pytest.raises(UserError, match='cannot be read as safetensors'):
        importing.open_directory(source)


def test_a_file_that_is_cut_short_or_too_long_is_refused(source):
    path = single(source)
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b'abcd'):
        path.write_bytes(content)
        with pytest.raises(UserError, match='cannot be read as safetensors'):
            importing.open_directory(source)


def test_pickles_are_never_opened(source):
    single(source).unlink()
    (source / 'pytorch_model.bin').write_bytes(b'\x80\x04K.')
    with pytest.raises(UserError, match='other formats of weights are not read'):
        importing.open_directory(source)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model_type': 'gpt2'}, "model_type='gpt2' is not one of"),
        ({'model_type': ['llama']}, 'model_type'),
        ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
        ({'attention_bias': True}, 'attention_bias=True is not supported'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config'),
        ({'rope_scaling': {'type': 'longrope'}}, 'rope_type'),
        ({'rope_scaling': {'type': 'yarn', 'factor': 'x'}}, 'factor='),
        ({'rope_scaling': {'type': 'linear', 'factor': 0.0}}, 'factor'),
        ({'rope_scaling': [3]}, 'rope_scaling'),
        ({'num_hidden_layers': 10**9}, 'num_hidden_layers=1000000000 must lie between'),
        ({'num_hidden_layers': 9999}, 'too few for the 9999 layers'),
        (
            {'model_type': 'mixtral', 'num_local_experts': 10**9, 'num_experts_per_tok': 2},
            'too few for the 3 layers and 1000000000 experts',
        ),
        ({'max_position_embeddings': 2**31 - 1, 'rope_theta': 10**400}, 'rope_theta'),
        ({'num_hidden_layers': 2}, 'no model of its config.json has'),
        ({'num_hidden_layers': 'x'}, "num_hidden_layers='x' must be a finite number"),
        ({'hidden_size': 2**40}, 'hidden_size'),
        ({'hidden_size': -42}, 'hidden_size=-42 must be a whole number of 0 or more'),
        ({'hidden_size': float('nan')}, 'must be a finite number'),
        ({'num_attention_heads': 0}, 'num_attention_heads=0 must be above 0'),
        ({'num_attention_heads': 5}, 'must be a multiple'),
        ({'num_key_value_heads': 3}, 'has shape'),
        ({'head_dim': 11}, 'head_dim=11 must be even'),
        ({'vocab_size': 0}, 'vocab_size=0'),
        ({'vocab_size': V + 1}, 'embed_tokens.weight has shape'),
        ({'tie_word_embeddings': 'yes'}, 'tie_word_embeddings'),
        ({'rms_norm_eps': 0}, 'norm_eps'),
        ({'layer_types': ['full_attention']}, 'layer_types'),
        ({'model_type': 'helios', 'helios': {'vocab_size': V, 'gmu': {'kind': 'hyper'}}}, STREAMS),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_tensors_or_itself_is_refused(source, changes, message):
    changes = {'use_sliding_window': True, 'sliding_window': 4, **changes}
    change(source / 'config.json', **changes)
    with pytest.raises(UserError, match=message) as caught:
        importing.open_directory(source)
    assert '\n' not in str(caught.value)


def test_a_model_of_several_streams_is_not_exported(tmp_path):
    cfg = config.replace(config.Config(), {'model.gmu.kind': 'hyper'})
    restored = Restored(Transformer(cfg.model), {'params': {}}, ByteTokenizer(), cfg)
    with pytest.raises(UserError, match=STREAMS):
        exporting.write(
            restored, {}, tmp_path / 'out', origin={}, dtype='float32', shard_bytes=20_000
        )
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(source):
    hugging_face.write_tokenizer(source, V + 1)
    with pytest.raises(UserError, match=f'has {V + 1} tokens, but the model has room for {V}'):
        importing.open_directory(source)
    hugging_face.write_tokenizer(source, V - 2)  # rows of the model may be left over
    importing.open_directory(source)
    change(source / 'config.json', eos_token_id=7)
    with pytest.raises(UserError, match=r"eos_token='</s>' .* is number 1 .* eos_token_id=7"):
        importing.open_directory(source)
    (source / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='has no tokenizer'):
        importing.open_directory(source)


@pytest.mark.parametrize('value', [np.nan, pytest.param(-np.inf, marks=pytest.mark.slow)])
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(
    source, value, monkeypatch, capsys, tmp_path
):
    monkeypatch.undo()
    weight = np.ones(D, np.float32)
    weight[3] = value
    rewrite(single(source), {NORM: weight})
    line = refused(capsys, 'convert', f'--from={source}', f'--to={tmp_path / "run"}')
    assert f'tensor {NORM} has a value that is NaN or infinite' in line
    assert not [*tmp_path.glob('run*')]


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_contradict_it(source, monkeypatch):
    monkeypatch.undo()
    change(source / 'config.json', tie_word_embeddings=True)
    with pytest.raises(UserError, match=r'lm_head\.weight differs'):
        importing.load(importing.open_directory(source))


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--upcycle=2,3'], '--upcycle=2,3 must be E,X'),
        (['--upcycle=x'], '--upcycle=x must be E,X'),
        (['--to='], '--to is missing'),
        (['--to={source}'], 'exists already'),
        (['--from=gs://bucket/x'], 'must be a local directory'),
        (['--from={source}/absent'], 'no such directory'),
        (['--dtype=int4'], '--dtype'),
        (['--shard_gb=0'], '--shard_gb'),
    ],
    ids=str,
)
def test_flags_that_cannot_be_are_refused(source, tmp_path, capsys, flags, message):
    flags = [flag.format(source=source) for flag in flags]
    given = [f'--from={source}', f'--to={tmp_path / "out"}', *flags]
    assert message in refused(capsys, 'convert', *given)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.parametrize('load', [lambda source, _: importing.load(source), workdir.save])
def test_the_host_holds_one_tensor_of_theirs_at_a_time(load, source, monkeypatch, tmp_path):
    monkeypatch.undo()
    import weakref

    alive, most = set(), []
    read = Tensors.read

    def watched(self, name):
        x = read(self, name)
        alive.add(name)
        weakref.finalize(x, alive.discard, name)
        most.append(len(alive))
        return x

    monkeypatch.setattr(Tensors, 'read', watched)
    load(importing.open_directory(source), tmp_path / 'run')
    assert max(most) <= 2  # the one before lives until its name is taken
    assert len(most) == 3 + L * 12
