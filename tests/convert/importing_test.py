"""Imports onto meshes, the way there and back, and the commands; nothing of transformers."""

import itertools
import json

import jax
import numpy as np
import pytest
from hugging_face import CONFIG, YARN, V, write_random, write_tokenizer
from safetensors.numpy import load_file, save_file

from helios_jax import checkpoint, cli, config, restoring
from helios_jax.convert import families, importing, rope, workdir
from helios_jax.errors import UserError
from helios_jax.parallel import mesh as meshes

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_layers_are_the_shortest_prefix_and_period():
    for kinds in itertools.product('ab', repeat=5):
        prefix, period = families.pattern(list(kinds))
        rest = len(kinds) - len(prefix)
        assert rest % len(period) == 0
        assert prefix + period * (rest // len(period)) == list(kinds)
    assert families.pattern(['f'] * 7) == ([], ['f'])
    assert families.pattern(['d', *['f', 'w'] * 3]) == (['d'], ['f', 'w'])
    assert families.pattern(['w', 'f', 'f', 'f']) == (['w'], ['f'])


@pytest.mark.parametrize(
    ('scaling', 'settings'),
    [
        ('none', {}),
        ('linear', {'factor': 4.0}),
        ('llama3', {'factor': 8.0, 'beta_slow': 1.5, 'beta_fast': 5.0}),
        ('ntk', {'factor': 3.0}),
        ('static', {'factor': 3.0, 'attention_factor': 1.3, 'truncate': False, 'beta_fast': 20.0}),
    ],
)
def test_rotary_settings_come_back(scaling, settings):
    ours = config.Rope(base=777.0, trained_length=96, scaling=scaling, **settings)
    assert rope.expressible(ours)
    assert rope.read(rope.write(ours), 10_000.0) == ours


@pytest.mark.slow
def test_any_mesh_holds_the_same_weights(tmp_path):
    write_random(tmp_path, CONFIG | {'intermediate_size': 58})
    opened = importing.open_directory(tmp_path, to_gmu=True, upcycle=(4, 2))
    sizes = {'fsdp': 2, 'expert': 2, 'tensor': 2}
    one, eight = (
        importing.load(opened, mesh=meshes.make(config.Mesh(**own), jax.devices()[:number]))
        for own, number in (({}, 1), (sizes, 8))
    )
    split = 0
    for mine, other in zip(
        jax.tree.leaves(one.variables),
        jax.tree.leaves(eight.variables),
        strict=True,
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)
        split += other.addressable_shards[0].data.size < other.size
    assert split > 10


def test_a_list_of_ends_travels_and_an_unknown_one_is_refused(tmp_path):
    write_random(tmp_path, CONFIG | {'eos_token_id': [1, 7]})
    files = importing.open_directory(tmp_path).files
    assert json.loads(files.contents['generation_config.json']) == {'eos_token_id': [1, 7]}
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [1, 5]}')
    files = importing.open_directory(tmp_path).files
    assert files.contents['generation_config.json'] == b'{"eos_token_id": [1, 5]}'
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [1, V]}))
    with pytest.raises(UserError, match=f'eos_token_id has {V}, but'):
        importing.open_directory(tmp_path)


@pytest.mark.slow
def test_commands_bring_a_model_in_let_it_speak_and_take_it_out(tmp_path, capsys):
    source, run, back = (str(tmp_path / name) for name in ('source', 'run', 'back'))
    (tmp_path / 'source').mkdir()
    written = write_random(tmp_path / 'source', CONFIG)
    cli.main(['convert', f'--from={source}', f'--to={run}'])
    assert 'from a qwen2 model' in capsys.readouterr().out
    cli.main(['convert', f'--from={run}', f'--to={back}'])
    assert 'a qwen2 model' in capsys.readouterr().out
    assert not list(tmp_path.glob('*.unfinished'))
    found = load_file(tmp_path / 'back/model.safetensors')
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(found[name], tensor)
    said = json.loads((tmp_path / 'back/config.json').read_text())
    assert families.read(said) == families.read(CONFIG)
    assert said['eos_token_id'] == CONFIG['eos_token_id']
    restored = restoring.restore(run)
    assert restored.tokenizer.vocab_size == V
    origin = restoring.read_metadata(run)['origin']
    assert (origin['format'], origin['family']) == ('huggingface', 'qwen2')
    assert restored.config.data.tokenizer == f'{run}/checkpoints/tokenizer/tokenizer.json'


@pytest.mark.slow
@pytest.mark.parametrize('changes', [{}, {'to_gmu': True}, {'upcycle': (3, 2)}], ids=str)
def test_a_workdir_has_what_is_read_onto_devices_and_keeps_bfloat16(changes, tmp_path):
    written = write_random(tmp_path, CONFIG | {'dtype': 'bfloat16'})
    narrow = {name: x.astype('bfloat16') for name, x in written.items()}
    save_file(narrow, tmp_path / 'model.safetensors')
    opened = importing.open_directory(tmp_path, **changes)
    workdir.save(opened, tmp_path / 'run', seed=3)
    one = meshes.make(config.Mesh(), jax.devices()[:1])
    loaded = importing.load(opened, mesh=one, seed=3)
    arrays = restoring.read_metadata(tmp_path / 'run')['arrays']
    from_file = {piece.weight.name for piece in opened.pieces}
    assert len(from_file) > 10
    for name, described in arrays['params'].items():
        assert described.startswith('bfloat16' if name in from_file else 'float32'), name
    restored = restoring.restore(tmp_path / 'run', mesh=one)
    for (path, mine), other in zip(
        jax.tree.leaves_with_path(restored.variables),
        jax.tree.leaves(loaded.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), other, err_msg=str(path))
    # As a run that starts from it asks for it.
    abstract = restoring.abstract_arrays(loaded.model, one)
    step = checkpoint.open_step(restoring.checkpoint_directory(tmp_path / 'run'))
    step.require_fit('params', abstract['params'])


@pytest.mark.slow
def test_generate_reads_an_imported_model(tmp_path, capsys):
    (tmp_path / 'source').mkdir()
    write_random(tmp_path / 'source', CONFIG | {'tie_word_embeddings': True})
    write_tokenizer(tmp_path / 'source', V - 4)  # rows without a token stay
    run = tmp_path / 'run'
    cli.main(['convert', f'--from={tmp_path / "source"}', f'--to={run}', '--to_gmu'])
    capsys.readouterr()
    cli.main(['generate', f'--checkpoint={run}', '--prompt=w7 w8', '--max_tokens=3'])
    assert capsys.readouterr().out.startswith('w7 w8')
    assert restoring.restore(run).config.model.spare_vocab == 4


@pytest.mark.slow
def test_yarn_of_a_command_takes_its_own_m_in_an_imported_model(tmp_path, monkeypatch, capsys):
    source, run = tmp_path / 'source', tmp_path / 'run'
    source.mkdir()
    scaling = {'rope_parameters': YARN | {'attention_factor': 1.3}}
    write_random(source, CONFIG | scaling)
    workdir.save(importing.open_directory(source), run)
    (tmp_path / 'text.txt').write_text('w7 w8 w9 ' * 30)
    restore, seen = restoring.restore, []

    def watched(*args, **settings):
        found = restore(*args, **settings)
        seen.append(found.model.model.rope)
        return found

    monkeypatch.setattr(restoring, 'restore', watched)
    reads = [f'--text={tmp_path / "text.txt"}', '--row_length=16', '--rows=1', '--batch_rows=8']
    writes = ['--prompt=w7', '--max_tokens=1', '--temperature=0']
    commands = {'eval': [*reads, '--allow_lossy_tokenizer'], 'generate': writes}
    for command, flags in commands.items():
        seen.clear()
        for yarn in ([], ['--yarn=8'], ['--yarn=dynamic']):
            cli.main([command, f'--checkpoint={run}', *flags, *yarn])
        found = [(rope.scaling, rope.factor, rope.attention_factor) for rope in seen]
        assert found[:2] == [('static', 4.0, 1.3), ('static', 8.0, 0.0)]
        assert (found[2][0], found[2][2]) == ('dynamic', 0.0)
    capsys.readouterr()
