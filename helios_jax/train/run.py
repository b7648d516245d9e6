"""Holds the objects of a run, compares the facts of its processes, and saves it."""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from helios_jax import checkpoint, config
from helios_jax.data import chat_template, pipeline
from helios_jax.data import tokenizer as tokenizers
from helios_jax.train import lock, report, update
from helios_jax.train import state as states

log = logging.getLogger(__name__)

CONFIG_FILE = 'config.json'

# Settings that say where something lies on one host: of these the contents are compared instead.
HOSTS_OWN = (
    'data.corpus', 'data.tokenizer', 'data.chat_template', 'data.cache_dir', 'data.num_workers',
    'train.compilation_cache',
)  # fmt: skip


@dataclasses.dataclass
class Run:
    """Objects that the functions of a run share."""

    workdir: epath.Path
    setup: states.Setup
    tokenizer: tokenizers.Tokenizer
    data: pipeline.Prepared
    checkpoints: checkpoint.Checkpoints
    lock: lock.Lock
    layer_gradients: bool = False  # compute each layer's gradient at the end, for the report

    @property
    def config(self) -> config.Config:
        return self.setup.config

    @functools.cached_property
    def to_working_copy(self) -> Callable[[PyTree], PyTree]:
        return jax.jit(functools.partial(update.working_copy, self.setup))

    @functools.cached_property
    def tokenizer_files(self) -> tuple[str, dict[str, bytes]]:
        """Spec by which a reader loads the tokenizer, and the contents of its files by name."""
        with tempfile.TemporaryDirectory() as folder:
            spec = self.tokenizer.save(epath.Path(folder))
            if self.data.train.chat_template or self.data.validation.chat_template:
                config = self.tokenizer.chat_template.config()
                (epath.Path(folder) / chat_template.CONFIG).write_text(config)
            return spec, {path.name: path.read_bytes() for path in epath.Path(folder).iterdir()}


def variables(state: states.TrainState) -> PyTree:
    return {'params': state.params} | ({'router': state.router} if state.router else {})


def readable(run: Run, state: states.TrainState, *, ema: bool) -> PyTree:
    """Returns `variables` on the device for the model to read; from the host, in a step's copy.

    Args:
      ema: the running average of the parameters in their place.
    """
    memory = run.config.memory
    params, place = (state.ema, memory.optimizer) if ema else (state.params, memory.parameters)
    if place == 'host':
        params = run.to_working_copy(params)
    return variables(state.replace(params=params))


def shared_facts(cfg: config.Config, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Facts that must be equal in every process of a run before anything is compiled."""
    return {
        **{name: value for name, value in config.settings(cfg).items() if name not in HOSTS_OWN},
        **{f'version of {name}': v for name, v in report.environment()['versions'].items()},
        'source of helios_jax': _source_digest(),
        'tokenizer': tokenizer.fingerprint,
    }


def save_inputs(run: Run) -> None:
    """Writes the config and the tokenizer's files, those that are not there already."""
    if jax.process_index() != 0:
        return
    text = json.dumps(dataclasses.asdict(run.config), indent=1)
    (run.workdir / CONFIG_FILE).write_text(text)
    directory = checkpoint.tokenizer_directory(run.checkpoints.directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in run.tokenizer_files[1].items():
        if not (directory / name).is_file() or (directory / name).read_bytes() != content:
            # Every checkpoint needs this file: it is never half written.
            temporary = directory / f'{name}.tmp'
            temporary.write_bytes(content)
            temporary.replace(directory / name)


def save(run: Run, state: states.TrainState, step: int, scores: dict[str, float]) -> None:
    spec, files = run.tokenizer_files
    metadata = {
        'config': dataclasses.asdict(run.config),
        'tokenizer': spec,
        'tokenizer_files': {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items()
        },
        'fingerprint': run.data.train.fingerprint,
        'data': run.data.contents,
        'samples': step * run.config.train.batch_rows,
        'environment': report.environment(),
    }
    items = {**variables(state), 'optimizer': state.optimizer}
    if state.ema:
        items['ema'] = state.ema
    run.lock.check()
    run.checkpoints.save(step, items, metadata, scores)


@functools.cache
def _source_digest() -> str:
    """Digest of this installation's code, whatever its version says."""
    root = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
