"""A training run, from a config to a report.

    prepare data → build → restore or initialise → (batch → step → log, evaluate, save)* → report

A run is resumed by starting it again with the same workdir: the state comes from the newest intact
checkpoint, the data from the number of samples it had consumed.
"""

import contextlib
import dataclasses
import json
import logging
import math
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from helios_jax import api, checkpoint, config
from helios_jax.data import baselines, pipeline
from helios_jax.data import tokenizer as tokenizers
from helios_jax.evaluate.generate import generate
from helios_jax.evaluate.perplexity import evaluate
from helios_jax.model import flops
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import cluster, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import metrics, report
from helios_jax.train import state as states
from helios_jax.train.step import make_train_step

log = logging.getLogger(__name__)

# Settings that may change when a run is resumed: none of them changes what a step computes.
FREE_TO_CHANGE = (
    'train.num_steps', 'train.log_every', 'train.eval_every', 'train.eval_rows',
    'train.checkpoint_every', 'train.keep_checkpoints', 'train.profile_steps', 'train.tensorboard',
    'train.compilation_cache', 'train.microbatches', 'train.init_from', 'mesh.', 'memory.',
    'data.cache_dir', 'data.num_workers', 'data.tokenizer', 'model.attention',
)  # fmt: skip
SAMPLE_TOKENS = 400


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


def train(cfg: config.Config, workdir: epath.PathLike) -> dict[str, float]:
    """Trains to the end, or until told to stop, and returns the last held-out metrics.

    SIGTERM or SIGINT finishes the step, saves and returns what there is ({} before the first
    evaluation).

    Raises:
      UserError: anything in config, data or workdir that cannot be used, before any compute; a loss
        that is no longer finite, with every checkpoint left intact.
    """
    enable_compilation_cache(cfg.train.compilation_cache)
    mesh = meshes.make(cfg.mesh)
    tokenizer = tokenizers.load(cfg.data.tokenizer)
    cfg = cfg.resolve(tokenizer.vocab_size)
    setup = states.create(cfg, mesh)
    workdir = epath.Path(workdir).expanduser()
    data = pipeline.prepare(cfg.data, tokenizer)
    checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', keep=cfg.train.keep_checkpoints)
    run = Run(workdir, setup, tokenizer, data, checkpoints)
    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(mesh),
        cluster.stop_on_signals() as stop,
    ):
        state, samples = restore_or_initialize(run)
        save_config(run)
        state, held_out = run_steps(run, state, samples, stop)
        if int(state.step) == cfg.train.num_steps:
            # A run that ended before its report was written has only that left to do.
            held_out = held_out or score(run, state)
            write_report(run, state, held_out)
    return held_out


def enable_compilation_cache(directory: str) -> None:
    if directory:
        path = epath.Path(directory).expanduser()
        jax.config.update('jax_compilation_cache_dir', str(path))


def save_config(run: Run) -> None:
    if jax.process_index() == 0:
        text = json.dumps(dataclasses.asdict(run.config), indent=1)
        (run.workdir / 'config.json').write_text(text)


def restore_or_initialize(run: Run) -> tuple[states.TrainState, int]:
    """The state to go on from, and the samples consumed so far."""
    directory, abstract = run.checkpoints.directory, run.setup.state
    step = run.checkpoints.latest()
    if step is None:
        state = states.initialize(run.setup)
        if run.config.train.init_from:
            state = start_from(run, state, run.config.train.init_from)
        return state, 0
    metadata = checkpoint.read_metadata(directory, step)
    check_resumable(run, metadata)
    collections = {'params': abstract.params, 'optimizer': abstract.optimizer}
    if abstract.router:
        collections['router'] = abstract.router
    restored = {n: checkpoint.restore(directory, step, n, t) for n, t in collections.items()}
    counter = jax.device_put(jax.numpy.asarray(step, abstract.step.dtype), abstract.step.sharding)
    log.info('Resuming %s from step %d.', run.workdir, step)
    state = states.TrainState(
        counter, restored['params'], restored['optimizer'], restored.get('router', {})
    )
    return state, metadata['samples']


def start_from(run: Run, state: states.TrainState, init_from: str) -> states.TrainState:
    """Fresh optimizer, parameters of another run's checkpoint (train.init_from)."""
    directory = api.checkpoint_directory(init_from)
    step = checkpoint.resolve(directory, 'latest')
    saved = api.load_tokenizer(directory, checkpoint.read_metadata(directory, step))
    config.require(
        saved.fingerprint == run.tokenizer.fingerprint,
        f'train.init_from={init_from} was trained with another tokenizer ({saved.vocab_size} '
        f'tokens) than data.tokenizer={run.config.data.tokenizer!r} ({run.tokenizer.vocab_size} '
        'tokens); use the one in its checkpoints/tokenizer.',
    )
    variables = api.restore_variables(run.setup.model, directory, step, run.setup.mesh)
    return state.replace(params=variables['params'], router=variables.get('router', {}))


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
    config.require(
        metadata['fingerprint'] == run.data.train.fingerprint,
        f'the data of corpus={run.config.data.corpus!r} has changed since {run.workdir} was begun; '
        'restore the files, or start in another workdir.',
    )


def _flat(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


def run_steps(
    run: Run, state: states.TrainState, samples: int, stop: cluster.StopRequest
) -> tuple[states.TrainState, dict[str, float]]:
    """Steps until the end or until told to stop; the state is saved when this returns."""
    cfg, held_out = run.config.train, {}
    first = int(state.step)
    batches = pipeline.train_batches(
        run.data, batch_rows=cfg.batch_rows, seed=cfg.seed, first_sample=samples
    )
    rows = sharding.sharding(run.setup.mesh, ('batch', 'length'))
    train_step = jax.jit(make_train_step(run.setup), donate_argnums=0)
    with metrics.MetricWriter(
        run.workdir, tensorboard=cfg.tensorboard, resume_step=first, num_steps=cfg.num_steps
    ) as writer:
        progress = Progress(run)
        for step in range(first + 1, cfg.num_steps + 1):
            with progress.timer.measure('data_wait'):
                batch = pipeline.to_global(next(batches), rows)
            with profiled(run.workdir, step - first, cfg.profile_steps):
                state, reported = train_step(state, batch)
            # What is due at this step is done before stopping: the resumed run starts behind it.
            stopping = stop.agreed()
            due = lambda every: step == cfg.num_steps or (every and step % every == 0)  # noqa: E731, B023
            if due(cfg.log_every):
                writer.write(step, progress.figures(step, reported))
            scores: dict[str, float] = {}
            if due(cfg.eval_every):
                with progress.timer.measure('evaluation'):
                    scores = held_out = score(run, state)
                writer.write(step, {f'eval/{name}': value for name, value in scores.items()})
            if due(cfg.checkpoint_every) or scores or stopping:
                with progress.timer.measure('checkpoint'):
                    check_finite(run, step, reported)
                    save(run, state, step, scores)
            if stopping:
                break
    run.checkpoints.wait()
    return state, held_out


class Progress:
    """Turns a step's device metrics and the clock into figures for people."""

    def __init__(self, run: Run) -> None:
        self.timer = metrics.Timer()
        self.last_step: int | None = None
        cfg = run.config
        self.row_tokens = cfg.data.row_length
        self.flops = flops.flops_per_token(cfg.model, cfg.data.row_length)
        self.peak = flops.peak_flops(jax.devices()[0].device_kind) * jax.device_count()
        self.run = run

    def figures(self, step: int, reported: dict[str, jax.Array]) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(reported).items()}
        check_finite(self.run, step, values)
        return values | self.timer.figures(values['tokens'], self.flops, self.peak)


def check_finite(run: Run, step: int, reported: dict[str, Any]) -> None:
    loss = float(reported['loss'])
    if math.isfinite(loss):
        return
    run.checkpoints.wait()
    raise config.UserError(
        f'the loss is {loss} at step {step}; nothing was saved since step '
        f'{max(run.checkpoints.steps(), default=0)}. Lower optimizer.learning_rate (now '
        f'{run.config.optimizer.learning_rate}) or raise optimizer.warmup_steps, and start again.'
    )


class profiled:  # noqa: N801
    """Profiles `num_steps` steps from the tenth on, into workdir/profile."""

    def __init__(self, workdir: epath.Path, nth: int, num_steps: int) -> None:
        self.starts, self.ends = num_steps and nth == 10, num_steps and nth == 9 + num_steps
        self.directory = workdir / 'profile'

    def __enter__(self) -> None:
        if self.starts:
            jax.profiler.start_trace(str(self.directory))

    def __exit__(self, *error: object) -> None:
        if self.ends:
            jax.effects_barrier()
            jax.profiler.stop_trace()


def score(run: Run, state: states.TrainState) -> dict[str, float]:
    """Held-out loss and bits per byte."""
    cfg = run.config
    rows = sharding.sharding(run.setup.mesh, ('batch', 'length'))
    batches = pipeline.eval_batches(
        run.data.validation, batch_rows=cfg.train.batch_rows, num_rows=cfg.train.eval_rows
    )
    return evaluate(
        Transformer(cfg.model),
        variables(state),
        (pipeline.to_global(batch, rows) for batch in batches),
        eos_id=run.tokenizer.eos_id,
        packed=cfg.data.packing == 'best_fit',
    )


def variables(state: states.TrainState) -> PyTree:
    return {'params': state.params} | ({'router': state.router} if state.router else {})


def save(run: Run, state: states.TrainState, step: int, scores: dict[str, float]) -> None:
    directory = checkpoint.tokenizer_directory(run.checkpoints.directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {
        'config': dataclasses.asdict(run.config),
        'tokenizer': run.tokenizer.save(directory),
        'fingerprint': run.data.train.fingerprint,
        'samples': step * run.config.train.batch_rows,
        'environment': report.environment(),
    }
    items = {**variables(state), 'optimizer': state.optimizer}
    run.checkpoints.save(step, items, metadata, scores)


def write_report(run: Run, state: states.TrainState, held_out: dict[str, float]) -> None:
    """report.md in the workdir, with a sample that continues held-out text."""
    prompt, sample = continuation(run, state)
    if jax.process_index() != 0:
        return
    validation = run.data.validation
    data = {
        'corpus': run.config.data.corpus,
        'fingerprint': run.data.train.fingerprint,
        'training tokens': run.data.train.num_tokens,
        'training bytes': run.data.train.num_bytes,
        'held-out bytes': validation.num_bytes,
    }
    yardsticks = baselines.bits_per_byte(validation, run.tokenizer)
    figures = dict(held_out) | {f'{n} (bits per byte)': v for n, v in yardsticks.items()}
    path = report.write(
        run.workdir,
        config_dict=dataclasses.asdict(run.config),
        environment=report.environment(),
        data=data,
        final=figures,
        sample=f'{prompt}⟦generated from here⟧{sample}',
    )
    log.info('Report: %s', path)
    lines = [f'{name}: {value:.4g}' for name, value in figures.items()]
    print('\n'.join([*lines, '', prompt + sample, '', f'Report: {path}']))


def continuation(run: Run, state: states.TrainState) -> tuple[str, str]:
    """The opening of a held-out document, and what the model makes of it."""
    row = next(
        iter(
            pipeline.eval_batches(
                run.data.validation, batch_rows=1, num_rows=1, num_hosts=1, host=0
            )
        )
    )
    length = min(64, max(2, run.config.data.row_length // 4))
    prompt = [int(token) for token in row.tokens[0, :length]]
    made = generate(
        Transformer(run.config.model),
        variables(state),
        [prompt],
        max_tokens=SAMPLE_TOKENS,
        eos_id=run.tokenizer.eos_id,
        temperature=0.8,
        seed=run.config.train.seed,
    )
    return run.tokenizer.decode(prompt), run.tokenizer.decode(made[0])
