"""Makes an imported model a workdir that `helios generate`, `eval` and `train.init_from` open."""

import contextlib
import dataclasses
import hashlib
import json

from etils import epath

from helios_jax import checkpoint, config
from helios_jax.convert.importing import Imported
from helios_jax.train import report
from helios_jax.train.run import CONFIG_FILE


def save(imported: Imported, workdir: epath.PathLike) -> None:
    """Writes a model as step 0 of a run that has not begun, with its config and its tokenizer."""
    workdir = checkpoint.absolute(workdir)
    restored, files, origin = imported
    folder = checkpoint.tokenizer_directory(workdir / 'checkpoints')
    folder.mkdir(parents=True)
    for name, content in files.contents.items():
        (folder / name).write_bytes(content)
    cfg = config.replace(restored.config, {'data.tokenizer': str(folder / files.spec)})
    (workdir / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.contents.items()}
    metadata = {
        'config': dataclasses.asdict(cfg),
        'tokenizer': files.spec,
        'tokenizer_files': hashes,
        'samples': 0,
        'environment': report.environment(),
        'origin': origin,
    }
    with contextlib.closing(checkpoint.Checkpoints(workdir / 'checkpoints', keep=1)) as writer:
        writer.save(0, restored.variables, metadata)
