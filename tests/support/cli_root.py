"""A directory for the tests of the command line."""

from pathlib import Path

import pytest
import small_run

from helios_jax import cli, config
from helios_jax.train import finish


def make(root: Path) -> Path:
    """Fills the directory with a config, a finished run, and files that are not what they seem."""
    cfg = small_run.make_config(root)
    changes = {'train.num_steps': 10, 'train.eval_every': 5, 'train.checkpoint_every': 0}
    cfg = config.replace(cfg, changes)
    small_run.write_config(cfg, root / 'small.py')
    (root / 'empty').mkdir()
    (root / 'empty' / 'nothing.txt').write_text('')
    (root / 'binary.txt').write_bytes(b'text \xff\x00 no more')
    (root / 'broken.jsonl').write_text('{"text": "fine"}\n{"txt": "not"}\n')
    (root / 'tokenizer.json').write_text('{"model": "none"}')
    (root / 'not_a_config.py').write_text('x = 1\n')
    (root / 'a_file').write_text('kept')
    (root / 'a_directory.json').mkdir()
    for name in ('config.json', 'metrics.jsonl'):
        (root / f'a_directory_for_{name}' / name).mkdir(parents=True)
    (root / 'full.json').symlink_to('/dev/full')
    (root / 'loop').symlink_to(root / 'loop')
    (root / 'broken.py').write_text('\n\ndef get_config():\n    return CONFIG\n')
    (root / 'with:colon.py').write_text((root / 'small.py').read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, 'SAMPLE_TOKENS', 3)
        cli.main(['train', f'--config={root}/small.py', f'--workdir={root}/run'])
    return root
