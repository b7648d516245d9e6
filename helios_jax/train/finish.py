"""Finishes a run: its held-out score, a report, a sample, and a table for people."""

import dataclasses
import math
import sys
from typing import Any

import jax
import rich.console
import rich.text
from etils import epath
from jaxtyping import PyTree

from helios_jax import display
from helios_jax.arch import rules
from helios_jax.data import baselines, pipeline
from helios_jax.evaluate import figures, gradients, sublayers
from helios_jax.evaluate.generate import generate
from helios_jax.evaluate.perplexity import evaluate
from helios_jax.model.transformer import Transformer
from helios_jax.parallel import sharding
from helios_jax.train import layers, metrics, report
from helios_jax.train import state as states
from helios_jax.train.run import Run, readable
from helios_jax.train.step import compiler_options_of

SAMPLE_TOKENS = 400


def score(run: Run, state: states.TrainState) -> dict[str, float]:
    """Computes held-out loss and bits per byte.

    Of the running average where there is one, as `helios eval` does; those of the parameters
    themselves stand beside them, as `trained_loss` and `trained_bits_per_byte`.
    """
    trained = _score(run, readable(run, state, ema=False))
    if not run.config.train.ema:
        return trained
    beside = {f'trained_{name}': trained[name] for name in ('loss', 'bits_per_byte')}
    return _score(run, readable(run, state, ema=True)) | beside


def _score(run: Run, variables: PyTree) -> dict[str, float]:
    cfg = run.config
    rows = sharding.sharding(run.setup.mesh, ('batch', 'length'))
    batches = pipeline.eval_batches(
        run.data.validation, batch_rows=cfg.train.batch_rows, num_rows=cfg.train.eval_rows
    )
    return evaluate(
        Transformer(cfg.model),
        variables,
        (pipeline.to_global(batch, rows) for batch in batches),
        eos_id=run.tokenizer.eos_id,
        documents_apart=cfg.data.documents_apart,
        lost_fraction=run.data.validation.lost_fraction,
    )


def write_report(run: Run, state: states.TrainState, held_out: dict[str, float]) -> None:
    """Writes report.md into the workdir, with a sample that continues held-out text; prints both.

    Every process calls this: the sample, and what the layers do, is computed by all of them.
    """
    with display.phase('Looking at the layers'):
        observed = observe(run, state)
    with display.phase('Writing a sample'):
        prompt, sample = continuation(run, state)
    if jax.process_index() != 0:
        return
    layers.write(run.workdir, observed)
    validation = run.data.validation
    data = {
        'corpus': run.config.data.corpus,
        'fingerprint': run.data.train.fingerprint,
        'training tokens': run.data.train.num_tokens,
        'training bytes': run.data.train.num_bytes,
        'held-out bytes': validation.num_bytes,
    }
    yardsticks = baselines.bits_per_byte(validation, run.tokenizer)
    final = {**held_out, **yardsticks, **figures.speed(metrics.read(run.workdir / metrics.FILE))}
    environment = report.environment()
    if options := compiler_options_of(run.config, jax.local_devices()[0], run.setup.mesh.size):
        environment['compiler options of the step'] = options
    path = report.write(
        run.workdir,
        config_dict=dataclasses.asdict(run.config),
        environment=environment,
        data=data,
        final=final,
        sample=f'{prompt}⟦generated from here⟧{sample}',
    )
    show(final, prompt, sample, path)


def observe(run: Run, state: states.TrainState) -> dict[str, Any]:
    """Computes figures of sublayers on the fewest held-out rows that devices and processes share.

    They are those of `sublayers.figures`, and of `gradients.figures` beside them if the run
    was asked for them. Means over a row's tokens and channels are exact enough to draw.
    Rows are whole, as in training: a kernel may refuse shorter ones. That is at most a batch of
    `score`, and of a step.
    """
    cfg, mesh = run.config, run.setup.mesh
    num_rows = math.lcm(rules.shards(mesh, 'batch'), jax.process_count())
    validation = run.data.validation
    batch = next(pipeline.eval_batches(validation, batch_rows=num_rows, num_rows=num_rows))
    batch = pipeline.to_global(batch, sharding.sharding(mesh, ('batch', 'length')))
    given = readable(run, state, ema=bool(cfg.train.ema)), batch
    model = Transformer(cfg.model, cfg.memory)
    observed = sublayers.figures(model, *given, documents_apart=cfg.data.documents_apart)
    if not run.layer_gradients:
        return observed
    options = compiler_options_of(cfg, jax.local_devices()[0], mesh.size)
    found = gradients.figures(
        model, *given, documents_apart=cfg.data.documents_apart, compiler_options=options
    )
    joined = [a | b for a, b in zip(observed['sublayers'], found, strict=True)]
    return observed | {'sublayers': joined}


def show(final: dict[str, float], prompt: str, sample: str, path: epath.Path) -> None:
    """Prints a table of the figures, the sample and where the report lies."""
    console = rich.console.Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.print()
    display.table(figures.labelled(final))
    text = rich.text.Text(printable(prompt), style='dim')
    console.print('', text.append(printable(sample), style='not dim'), '', sep='\n', soft_wrap=True)
    console.print(f'Report: {path}', soft_wrap=True)


def printable(text: str) -> str:
    """Replaces each character that would steer a terminal by a mark."""
    return ''.join(c if c.isprintable() or c in '\n\t' else '�' for c in text)


def continuation(run: Run, state: states.TrainState) -> tuple[str, str]:
    """Returns the opening of a held-out document, and the model's continuation."""
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
        readable(run, state, ema=bool(run.config.train.ema)),
        [prompt],
        max_tokens=SAMPLE_TOKENS,
        eos_id=run.tokenizer.eos_id,
        temperature=0.8,
        seed=run.config.train.seed,
    )
    return run.tokenizer.decode(prompt), run.tokenizer.decode(made[0])
