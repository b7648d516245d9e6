"""Runs a training, from a config to a report.

    agree → lock → prepare data → restore or initialise → compile
    → (batch → step → log, evaluate, save)* → report

A run is resumed by starting it again with the same workdir: the state comes from the newest intact
checkpoint, the data from the number of samples it had consumed. A run that is refused before
`Lock.begin` has changed nothing in the workdir.
"""

import contextlib
import logging
from typing import Any

import jax
from etils import epath

from helios_jax import checkpoint, config, display
from helios_jax.arch import attention
from helios_jax.data import pipeline
from helios_jax.data import tokenizer as tokenizers
from helios_jax.memory import evidence
from helios_jax.parallel import agreement, cluster, platforms, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import lock, metrics, resume
from helios_jax.train import state as states
from helios_jax.train.finish import score, write_report
from helios_jax.train.progress import Progress, check_finite, profiled
from helios_jax.train.run import Run, save, save_inputs, shared_facts
from helios_jax.train.step import compile_step, few_documents

log = logging.getLogger(__name__)


def train(
    cfg: config.Config, workdir: epath.PathLike, *, layer_gradients: bool = False
) -> dict[str, float]:
    """Trains to the end, or until told to stop, and returns the last held-out metrics.

    SIGTERM or SIGINT finishes the step, saves and returns what there is ({} before the first
    evaluation).

    Args:
      layer_gradients: compute each layer's gradient at the end, for the report.
    Raises:
      UserError: anything in config, data or workdir that cannot be used, before any compute; a loss
        that is no longer finite, with every checkpoint left intact.
    """
    cluster.enable_compilation_cache(cfg.train.compilation_cache)
    workdir = epath.Path(workdir).expanduser()
    with agreement.together() as facts:
        tokenizer = tokenizers.load(cfg.data.tokenizer, chat_setting=cfg.data.chat_template)
        cfg = cfg.resolve(tokenizer.vocab_size)
        facts |= shared_facts(cfg, tokenizer)
    mesh = meshes.make(cfg.mesh)
    attention.choose(cfg.model, jax.default_backend(), ring=mesh.shape['context'] > 1)
    setup = states.create(cfg, mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        own = resume.own_step(workdir, cfg)
        parent = None if own else resume.parent_step(setup, tokenizer)
        held = stack.enter_context(lock.hold(workdir))
        # Again: what was there may have gone on, and is now read in full.
        own = resume.own_step(workdir, cfg, resume.ITEMS)
        with agreement.together() as facts:
            data = pipeline.prepare(cfg.data, tokenizer)
            facts['training data'] = data.train.fingerprint
            facts['validation data'] = data.validation.fingerprint
        if own:
            resume.require_same_data(workdir, cfg, data, own)
        checkpoints = checkpoint.Checkpoints(
            workdir / 'checkpoints', keep=cfg.train.keep_checkpoints
        )
        stack.enter_context(contextlib.closing(checkpoints))
        run = Run(workdir, setup, tokenizer, data, checkpoints, held, layer_gradients)
        stop = stack.enter_context(cluster.stop_on_signals())
        state, samples = resume.initial_state(setup, own, parent)
        state, held_out = run_steps(run, state, samples, stop)
        if int(state.step) == cfg.train.num_steps:
            # A run that ended before its report was written has only that left to do.
            held_out = held_out or score(run, state)
            write_report(run, state, held_out)
    return held_out


def run_steps(
    run: Run, state: states.TrainState, samples: int, stop: cluster.StopRequest
) -> tuple[states.TrainState, dict[str, float]]:
    """Runs steps until the end or until told to stop; the state is saved when this returns.

    Nothing in the workdir changes before the step is compiled, for the first batch.
    """
    cfg, held_out = run.config.train, {}
    first = int(state.step)
    batches = pipeline.train_batches(
        run.data, batch_rows=cfg.batch_rows, seed=cfg.seed, first_sample=samples
    )
    rows = sharding.sharding(run.setup.mesh, ('batch', 'length'))
    progress = Progress(run, first)
    programs: dict[bool, Any] = {}  # for batches of few documents a row, and for any

    def next_batch() -> tuple[bool, pipeline.Batch]:
        with progress.timer.measure('data_wait'):
            own = next(batches)
            return few_documents(run.config.data, own), pipeline.to_global(own, rows)

    def step_for(few: bool) -> Any:
        if few not in programs:
            with progress.timer.measure('compile'):
                programs[few] = verified_step(run, state, batch, few)
        return programs[few]

    if first < cfg.num_steps:
        few, batch = next_batch()
        step_for(few)
    run.lock.begin()
    with metrics.MetricWriter(
        run.workdir, tensorboard=cfg.tensorboard, resume_step=first, num_steps=cfg.num_steps
    ) as writer:
        save_inputs(run)
        for step in range(first + 1, cfg.num_steps + 1):
            if step > first + 1:
                few, batch = next_batch()
            train_step = step_for(few)
            with profiled(run, step - first) as ends:
                state, reported = train_step(state, batch)
                if ends:
                    jax.block_until_ready(state)  # or the profile would miss this step
            progress.count(reported)
            # What is due at this step is done before stopping: the resumed run starts behind it.
            stopping = stop.agreed()
            run.lock.check()
            due = lambda every: step == cfg.num_steps or (every and step % every == 0)  # noqa: B023
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


def verified_step(run: Run, state: states.TrainState, batch: pipeline.Batch, few: bool) -> Any:
    """Compiles the step for these arrays; returns it if it saves what was asked for.

    Args:
      few: no row of its batches has many documents (`step.few_documents`).
    Raises:
      UserError: an action of memory.actions that did not take effect.
    """
    host = platforms.has_host_memory()
    with display.phase('Compiling the training step'):
        made = compile_step(run.setup, state, batch, few=few)
        saved = evidence.verified(run.config.memory, made.traced, made.compiled, host=host)
    if jax.process_index() == 0 and saved:
        log.info(evidence.line(saved, host=host))
    return made.run
