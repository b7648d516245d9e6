import json

import small_checkpoints
from folders import entries
from refusals import refused

from helios_jax import cli


def test_intact_steps_are_listed_with_their_files(original, capsys):
    before = entries(original)
    cli.main(['ckpt', 'verify', str(original), '--json'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row['step'], row['damage']) for row in rows] == [(20, ''), (40, ''), (60, '')]
    folder = original / 'checkpoints/40'
    files = [p for p in folder.rglob('*') if p.is_file() and p.parent != folder]
    assert rows[1]['files'] == len(files)
    assert rows[1]['bytes'] == sum(path.stat().st_size for path in files)
    cli.main(['ckpt', 'verify', str(original), '--step=40'])
    assert capsys.readouterr().out.splitlines()[1:] == [
        f'{40:>10} {rows[1]["files"]:>7,} {rows[1]["bytes"]:>18,}  none'
    ]
    assert entries(original) == before


def test_damage_in_any_item_or_the_tokenizer_is_named_and_ends_with_code_2(workdir, capsys):
    for step, item in ((20, 'ema'), (40, 'optimizer')):
        name = small_checkpoints.damage(workdir, step, item)
        line = refused(capsys, 'ckpt', 'verify', str(workdir), f'--step={step}')
        assert '1 of 1 steps' in line and name not in line
    (workdir / 'checkpoints/60/manifest.json').rename(workdir / 'manifest.json')
    assert '3 of 3 steps' in refused(capsys, 'ckpt', 'verify', str(workdir))
    (workdir / 'manifest.json').rename(workdir / 'checkpoints/60/manifest.json')
    assert 'damaged: 20, 40;' in refused(capsys, 'ckpt', 'verify', str(workdir))
    cli.main(['ckpt', 'verify', str(workdir), '--step=60'])
    (workdir / 'checkpoints/tokenizer/tokenizer.json').write_text('{}')
    assert 'damaged: 20, 40, 60;' in refused(capsys, 'ckpt', 'verify', str(workdir))
    assert 'step=30 is not in' in refused(capsys, 'ckpt', 'verify', str(workdir), '--step=30')
