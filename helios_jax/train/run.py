"""A run: what its parts share, and how it is saved, resumed and started from another."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from helios_jax import api, checkpoint, config
from helios_jax.data import pipeline
from helios_jax.data import tokenizer as tokenizers
from helios_jax.data.rows import changes
from helios_jax.train import report, streaming
from helios_jax.train import state as states

log = logging.getLogger(__name__)

# Settings that may change when a run is resumed: none changes what a step computes, but for
# num_steps, where the learning rate's schedule ends.
FREE_TO_CHANGE = (
    'train.num_steps', 'train.log_every', 'train.eval_every', 'train.eval_rows',
    'train.checkpoint_every', 'train.keep_checkpoints', 'train.profile_steps', 'train.tensorboard',
    'train.compilation_cache', 'train.microbatches', 'train.init_from', 'mesh.', 'memory.',
    'data.cache_dir', 'data.num_workers', 'data.tokenizer', 'data.allow_lossy_tokenizer',
    'model.attention',
)  # fmt: skip


@dataclasses.dataclass
class Run:
    """What the parts of a run share."""

    workdir: epath.Path
    setup: states.Setup
    tokenizer: tokenizers.Tokenizer
    data: pipeline.Prepared
    checkpoints: checkpoint.Checkpoints

    @property
    def config(self) -> config.Config:
        return self.setup.config

    @functools.cached_property
    def copy(self) -> Callable[[PyTree], PyTree]:
        return jax.jit(functools.partial(streaming.working_copy, self.setup))


def variables(state: states.TrainState) -> PyTree:
    return {'params': state.params} | ({'router': state.router} if state.router else {})


def readable(run: Run, state: states.TrainState) -> PyTree:
    """`variables` on the device, for the model to read: the copy that a step would make."""
    if run.config.memory.parameters == 'device':
        return variables(state)
    return variables(state.replace(params=run.copy(state.params)))


def save_config(run: Run) -> None:
    if jax.process_index() == 0:
        text = json.dumps(dataclasses.asdict(run.config), indent=1)
        (run.workdir / 'config.json').write_text(text)


def save(run: Run, state: states.TrainState, step: int, scores: dict[str, float]) -> None:
    directory = checkpoint.tokenizer_directory(run.checkpoints.directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {
        'config': dataclasses.asdict(run.config),
        'tokenizer': run.tokenizer.save(directory),
        'fingerprint': run.data.train.fingerprint,
        'data': run.data.contents,
        'samples': step * run.config.train.batch_rows,
        'environment': report.environment(),
    }
    items = {**variables(state), 'optimizer': state.optimizer}
    run.checkpoints.save(step, items, metadata, scores)


def restore_or_initialize(run: Run) -> tuple[states.TrainState, int]:
    """The state to go on from, and the samples consumed so far."""
    directory, counter = run.checkpoints.directory, run.setup.state.step
    step = run.checkpoints.latest()
    if step is None:
        source = run.config.train.init_from
        borrowed = borrow(run, source) if source else {}
        return states.initialize(run.setup).replace(**borrowed), 0
    metadata = checkpoint.read_metadata(directory, step)
    check_resumable(run, metadata)
    restored = restore(run, directory, step, 'params', 'optimizer', 'router')
    count = jax.device_put(jax.numpy.asarray(step, counter.dtype), counter.sharding)
    log.info('Resuming %s from step %d.', run.workdir, step)
    return states.TrainState(count, **restored), metadata['samples']


def restore(run: Run, directory: epath.Path, step: int, *items: str) -> dict[str, PyTree]:
    """Parts of a saved state, where this run keeps them."""
    abstract = {item: getattr(run.setup.state, item) for item in items}
    # A dense model has no router to be saved.
    return {
        item: checkpoint.restore(directory, step, item, tree) if tree else tree
        for item, tree in abstract.items()
    }


def borrow(run: Run, init_from: str) -> dict[str, PyTree]:
    """Parameters and balance biases of another run's latest checkpoint."""
    directory = api.checkpoint_directory(init_from)
    step = checkpoint.resolve(directory, 'latest')
    saved = api.load_tokenizer(directory, checkpoint.read_metadata(directory, step))
    config.require(
        saved.fingerprint == run.tokenizer.fingerprint,
        f'train.init_from={init_from} was trained with another tokenizer ({saved.vocab_size} '
        f'tokens) than data.tokenizer={run.config.data.tokenizer!r} ({run.tokenizer.vocab_size} '
        'tokens); use the one in its checkpoints/tokenizer.',
    )
    return restore(run, directory, step, 'params', 'router')


def check_resumable(run: Run, metadata: dict[str, Any]) -> None:
    """Refuses to go on with other settings or other data than the run began with, or backwards."""
    config.require(
        metadata['step'] <= run.config.train.num_steps,
        f'train.num_steps={run.config.train.num_steps}, but {run.workdir} is at step '
        f'{metadata["step"]} already; raise it to go on, or choose another workdir.',
    )
    saved, now = _flat(metadata['config']), _flat(dataclasses.asdict(run.config))
    for name, value in now.items():
        config.require(
            name.startswith(FREE_TO_CHANGE) or saved.get(name) == value,
            f'{name}={value!r}, but {run.workdir} was trained with {saved.get(name)!r}; set it '
            'back, or start in another workdir (train.init_from takes its parameters along).',
        )
    now = run.data.contents
    saved = metadata.get('data') or {}  # older checkpoints have only the training rows' fingerprint
    changed = {split: changes(saved[split], now[split]) for split in saved}
    told = '; '.join(f'{split}: {change}' for split, change in changed.items() if change)
    config.require(
        metadata['fingerprint'] == run.data.train.fingerprint and not told,
        f'the data of corpus={run.config.data.corpus!r} has changed since {run.workdir} was begun'
        f'{told and f" ({told})"}; restore the files, or start in another workdir.',
    )


def _flat(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat
