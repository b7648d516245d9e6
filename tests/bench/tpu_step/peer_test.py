"""MaxText's step: what it is asked for, how it is compiled, what its kernels take."""

import json
import stat
import sys
from pathlib import Path

import pytest

from helios_jax import config
from helios_jax.bench.tpu_step import compare, peer
from helios_jax.errors import UserError
from helios_jax.plan.compiler.program import Instruction

CFG = config.Config(
    model=config.Model(
        vocab_size=1280, num_layers=7, embed_dim=512, num_heads=4, num_kv_heads=2, head_dim=128,
        mlp_dim=1536,
    ),
    data=config.Data(row_length=2048),
    train=config.Train(batch_rows=48),
    memory=config.Memory(policy='full'),
)  # fmt: skip


def test_maxtext_is_asked_for_the_same_shape():
    words = dict(word.split('=', 1) for word in peer.settings(CFG, 16, {'xla_a': 'true'}))
    assert (
        words | {'base_emb_dim': '512', 'base_num_query_heads': '4', 'base_mlp_dim': '1536'}
        == words
    )
    assert words | {'base_num_kv_heads': '2', 'base_num_decoder_layers': '7'} == words
    assert words | {'vocab_size': '1280', 'max_target_length': '2048'} == words
    assert words | {'per_device_batch_size': '3', 'compile_xla_flags': '--xla_a=true'} == words


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.moe.num_experts': 4, 'model.period': 'moe'}, 'dense models'),
        ({'model.tied_embeddings': True}, 'dense models'),
        ({'memory.policy': 'fp8'}, 'remat_policy'),
        ({'train.batch_rows': 40}, 'multiple of the 16'),
    ],
)
def test_what_it_would_not_train_the_same_way_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        peer.settings(config.replace(CFG, changes), 16, {})


def test_forms_of_its_options():
    assert peer.options_of('defaults', 'v5p') == {}
    assert peer.options_of('ours', 'v5p')['xla_tpu_scoped_vmem_limit_kib'] == '65536'
    assert peer.options_of('ours', 'v6e')['xla_tpu_scoped_vmem_limit_kib'] == '98304'
    for chip in peer.RECIPES:
        assert peer.options_of('recipe', chip)['xla_tpu_enable_data_parallel_all_reduce_opt']
    with pytest.raises(UserError, match='none for tpu7x'):
        peer.options_of('recipe', 'tpu7x')


def python(folder: Path, code: str) -> str:
    """A Python that runs this code, whatever script it is given."""
    path = folder / 'python'
    path.write_text(f'#!{sys.executable}\n{code}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_it_is_compiled_by_its_own_libtpu(tmp_path, monkeypatch):
    monkeypatch.setenv('TPU_LIBRARY_PATH', '/ours/libtpu.so')
    code = (
        'import json, os, pathlib, sys\n'
        'pathlib.Path(sys.argv[3]).write_text("HloModule x")\n'
        'seen = {"library": os.environ.get("TPU_LIBRARY_PATH"), "words": sys.argv[5:]}\n'
        'pathlib.Path(sys.argv[4]).write_text(json.dumps(seen))'
    )
    program, figures = peer.compile_peer(python(tmp_path, code), 'v5p:2x2x1', ['a=1', 'b=2'])
    assert program == 'HloModule x'
    assert figures == {'library': None, 'words': ['a=1', 'b=2']}


def test_its_refusal_is_one_line(tmp_path):
    code = 'import sys\nprint("much\\nRuntimeError: too large\\n", file=sys.stderr); sys.exit(1)'
    with pytest.raises(UserError, match=r'^MaxText: RuntimeError: too large$'):
        peer.compile_peer(python(tmp_path, code), 'v5p:2x2x1', [])


@pytest.mark.parametrize('fused', [True, False])
def test_kernels_take_what_splash_attention_takes_alone(fused, monkeypatch):
    def rows(tasks, jobs):
        for task in tasks:
            names = {'forward': ['fwd'], 'backward': ['dkv'] if fused else ['dkv', 'dq']}[
                task.which
            ]
            assert task.options.get('fused', fused) == fused
            assert task.problem['batch'] == 3
            ms = task.options['block'] / 1024
            yield {
                'options': task.options,
                'kernel_ms': ms * len(names),
                'kernels': [{'name': f'splash_mha_{n}_no_residuals.3', 'ms': ms} for n in names],
            }

    monkeypatch.setattr(peer, 'run', rows)
    hlo = '%splash_mha_dkv_segmented.1' + ('' if fused else ' %splash_mha_dq_segmented.1')
    clock = peer.kernel_clock(hlo, CFG, 'v5p', 3)
    call = lambda name: clock(Instruction(name, 'f32[8]', 'custom-call', '', 1.0, True))
    forward, dkv, dq = (
        call(f'splash_mha_{n}_segmented_no_residuals.9') for n in ('fwd', 'dkv', 'dq')
    )
    assert forward and forward == dkv
    assert dq == (None if fused else dkv)
    assert call('ragged-dot.1') is None


def test_ours_and_the_peer_are_played_and_compared(monkeypatch, capsys):
    found = {'cycles': 3e9, 'step_seconds': 2.0, 'step_mfu': 0.75, 'kernels': {}, 'left_out': {}}
    ours = found | {'step_by_kind': {'matmuls': 1.9, 'network': 0.1}}
    ours |= {'temp_gib': 12.0, 'peak_gib': 14.0}
    theirs = found | {'step_seconds': 2.5, 'step_by_kind': {'matmuls': 2.0, 'network': 0.5}}
    made = {'coordinates': [], 'temp_bytes': 2**30, 'peak_bytes': 2**31, 'versions': {'jax': '9'}}
    monkeypatch.setattr(compare.compiled, 'compiled_figures', lambda *args, timed: ours)
    monkeypatch.setattr(compare.peer, 'compile_peer', lambda *args: ('', made))
    monkeypatch.setattr(compare.peer, 'kernel_clock', lambda *args: None)
    monkeypatch.setattr(compare.step, 'figures', lambda hlo: {})
    monkeypatch.setattr(compare.predicted, 'figures', lambda *args: theirs)
    compare.compare_steps(CFG, 'v5p:2x2x4', python='python', forms=['ours'], as_json=True)
    mine, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert (mine['waiting'], other['waiting']) == (0.05, 0.2)
    assert (other['temp_gib'], other['peak_gib']) == (1, 2)
    compare.compare_steps(CFG, 'v5p:2x2x4', python='python', forms=['ours'], as_json=False)
    assert '0.800' in capsys.readouterr().out
    with pytest.raises(UserError, match='--forms=best: there are'):
        compare.compare_steps(CFG, 'v5p:2x2x4', python='python', forms=['best'], as_json=True)
