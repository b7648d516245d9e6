"""Starts a run from its own newest step, from another run's parameters, or fresh."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from helios_jax import checkpoint, config, restoring
from helios_jax.data import pipeline
from helios_jax.data import tokenizer as tokenizers
from helios_jax.data.rows import changes
from helios_jax.errors import require
from helios_jax.parallel import agreement
from helios_jax.train import metrics
from helios_jax.train import state as states
from helios_jax.train.run import CONFIG_FILE, variables

log = logging.getLogger(__name__)

ITEMS = ('params', 'optimizer', 'router', 'ema')  # the items of the state in a checkpoint

# Settings that may change when a run is resumed: none changes what a step computes, but for its
# rounding and for num_steps, where the learning rate's schedule ends.
FREE_TO_CHANGE = (
    'train.num_steps', 'train.log_every', 'train.eval_every', 'train.eval_rows',
    'train.checkpoint_every', 'train.keep_checkpoints', 'train.profile_steps', 'train.tensorboard',
    'train.compilation_cache', 'train.compiler_options', 'train.microbatches', 'train.init_from',
    'mesh.', 'memory.', 'data.cache_dir', 'data.num_workers', 'data.tokenizer',
    'data.chat_template', 'data.allow_lossy_tokenizer', 'model.attention',
)  # fmt: skip


def own_step(
    workdir: epath.Path, cfg: config.Config, items: Sequence[str] = ()
) -> checkpoint.Opened | None:
    """Opens the step that a run in `workdir` goes on from; None if there is none yet.

    Args:
      items: items that must be intact; steps where they are not are passed over.
    Raises:
      UserError: the run there has other settings or is further than this one is to go; something
        without a manifest lies where this run will save, or a directory where it keeps a file;
        metrics.jsonl cannot be read.
    """
    directory = checkpoint.absolute(workdir / 'checkpoints')
    with agreement.together():
        checkpoint.require_ours(directory)
        if jax.process_index() == 0:
            for name in (CONFIG_FILE, metrics.FILE):
                require(
                    not (workdir / name).is_dir(),
                    f'{workdir / name} is a directory, where a run keeps a file; move it away.',
                )
            if (workdir / metrics.FILE).exists():
                metrics.read(workdir / metrics.FILE)
    opened = None
    if agreement.from_first(checkpoint.committed(directory)):
        opened = checkpoint.open_step(directory, 'latest', items)
        require_resumable(workdir, cfg, opened)
    begin = opened.step if opened else 0
    for step in agreement.from_first(checkpoint.incomplete(directory)):
        require(
            not begin < step <= cfg.train.num_steps,
            f'{checkpoint.in_the_way(directory / str(step))} This run would begin at step {begin}.',
        )
    return opened


def fixed_settings(cfg: config.Config) -> dict[str, Any]:
    """Returns the settings that stay as they are for as long as a run goes on, by dotted name."""
    settings = config.settings(cfg)
    return {n: value for n, value in settings.items() if not n.startswith(FREE_TO_CHANGE)}


def parent_step(setup: states.Setup, tokenizer: tokenizers.Tokenizer) -> checkpoint.Opened | None:
    """Opens the latest step of `train.init_from`, whose parameters fit; None if that is not set.

    Raises:
      UserError: no checkpoint there, another tokenizer, or arrays of another shape.
    """
    cfg = setup.config
    init_from = cfg.train.init_from
    if not init_from:
        return None
    directory = restoring.checkpoint_directory(init_from)
    opened = checkpoint.open_step(directory, 'latest', restoring.VARIABLES)
    with agreement.together():
        saved = restoring.load_tokenizer(opened)
        require(
            saved.fingerprint == tokenizer.fingerprint,
            f'train.init_from={init_from} was trained with another tokenizer ({saved.vocab_size} '
            f'tokens) than data.tokenizer={cfg.data.tokenizer!r} ({tokenizer.vocab_size} tokens); '
            'use the one in its checkpoints/tokenizer.',
        )
    for item, tree in variables(setup.state).items():
        opened.require_fit(item, tree)
    return opened


def initial_state(
    setup: states.Setup, own: checkpoint.Opened | None, parent: checkpoint.Opened | None
) -> tuple[states.TrainState, int]:
    """Returns the state to go on from, and the samples consumed so far."""
    counter = setup.state.step
    if own is None:
        borrowed = load(setup, parent, *restoring.VARIABLES) if parent else {}
        if parent:
            borrowed['ema'] = begun_average(setup, parent)
        return states.initialize(setup).replace(**borrowed), 0
    if setup.state.ema and lacks_setting(own):
        log.info('train.ema: checkpoint %s is from before it; its parameters begin it.', own.folder)
        restored = load(setup, own, *(item for item in ITEMS if item != 'ema'))
        restored['ema'] = begun_average(setup, own)
    else:
        restored = load(setup, own, *ITEMS)
    count = jax.device_put(jax.numpy.asarray(own.step, counter.dtype), counter.sharding)
    log.info('Resuming %s from step %d.', own.directory.parent, own.step)
    return states.TrainState(count, **restored), own.metadata['samples']


def begun_average(setup: states.Setup, opened: checkpoint.Opened) -> PyTree:
    """Reads parameters once more, as the running average that begins with them."""
    return opened.restore('params', setup.state.ema) if setup.state.ema else {}


def lacks_setting(opened: checkpoint.Opened) -> bool:
    """True if the checkpoint was saved before there was a setting `train.ema`."""
    return 'ema' not in opened.metadata['config'].get('train', {})


def load(setup: states.Setup, opened: checkpoint.Opened, *items: str) -> dict[str, PyTree]:
    """Restores items of a checkpoint to where this run keeps them."""
    abstract = {item: getattr(setup.state, item) for item in items}
    # A dense model has no router to be saved, and few runs keep an average.
    return {item: opened.restore(item, tree) if tree else tree for item, tree in abstract.items()}


def require_resumable(workdir: epath.Path, cfg: config.Config, opened: checkpoint.Opened) -> None:
    """Refuses to go on with other settings than the run began with, or backwards."""
    require(
        'made_from' not in opened.metadata,
        f'{workdir} holds weights that helios ckpt made, without an optimizer; start in another '
        f'workdir, with train.init_from={workdir}.',
    )
    samples, rows = opened.metadata.get('samples'), cfg.train.batch_rows
    saved = fixed_settings(restoring.saved_config(opened))
    require(
        opened.step <= cfg.train.num_steps,
        f'train.num_steps={cfg.train.num_steps}, but {workdir} is at step {opened.step} already; '
        'raise it to go on, or choose another workdir.',
    )
    if lacks_setting(opened):
        saved['train.ema'] = cfg.train.ema
    for name, value in fixed_settings(cfg).items():
        require(
            saved[name] == value,
            f'{name}={value!r}, but {workdir} was trained with {saved[name]!r}; set it back, or '
            'start in another workdir (train.init_from takes its parameters along).',
        )
    require(
        samples == opened.step * rows,
        f'checkpoint {opened.folder} has consumed {samples} samples by its metadata, where '
        f'{opened.step} steps of {rows} rows make {opened.step * rows}; move it away to go on from '
        'the step before.',
    )


def require_same_data(
    workdir: epath.Path, cfg: config.Config, data: pipeline.Prepared, opened: checkpoint.Opened
) -> None:
    """Refuses to go on with other data than the run began with."""
    # Checkpoints of format 1 have only the training rows' fingerprint.
    now, saved = data.contents, opened.metadata.get('data', {})
    changed = {split: changes(saved[split], now[split]) for split in saved}
    told = '; '.join(f'{split}: {change}' for split, change in changed.items() if change)
    require(
        opened.metadata['fingerprint'] == data.train.fingerprint and not told,
        f'the data of corpus={cfg.data.corpus!r} has changed since {workdir} was begun'
        f'{told and f" ({told})"}; restore the files, or start in another workdir.',
    )
