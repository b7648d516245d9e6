"""One train step on some of the devices: its speed, its memory, and where its time goes.

Rows are random tokens that lie on the devices before the clock runs: no data is prepared or sent.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from helios_jax import chips, config
from helios_jax.arch import flops
from helios_jax.bench import trace
from helios_jax.data import pipeline
from helios_jax.errors import require
from helios_jax.parallel import cluster, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states
from helios_jax.train.step import CompiledStep, compile_step

WARMUP_STEPS, PROFILED_STEPS = 2, 2
SECONDS = 2.5  # of all steps on the clock
LEAST, MOST = 3, 30  # steps
GIB = 2**30


def device_facts() -> dict[str, Any]:
    """Names the devices that JAX finds; in a process of its own, for it holds their memory."""
    return {'kind': jax.devices()[0].device_kind, 'count': jax.device_count()}


def random_rows(cfg: config.Config, seed: int = 0) -> pipeline.Batch:
    """Draws a batch of rows that are one document each."""
    shape = (cfg.train.batch_rows, cfg.data.row_length)
    tokens = np.random.default_rng(seed).integers(cfg.model.vocab_size, size=shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones, num_bytes = np.ones(shape, np.int32), np.full(shape[0], shape[1], np.int32)
    return pipeline.Batch(tokens, ones, positions.copy(), ones > 0, num_bytes)


def measure_step(values: dict[str, Any], num_devices: int) -> dict[str, Any]:
    """Compiles a config's step for the first devices, times it and takes a profile.

    Args:
      values: the config as nested mappings.
    Raises:
      UserError: a loss that is not finite.
    """
    cfg = config.from_dict(values)
    cluster.start()
    cluster.enable_compilation_cache(cfg.train.compilation_cache)
    devices = jax.devices()[:num_devices]
    mesh = meshes.make(cfg.mesh, devices)
    setup = states.create(cfg, mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as profile:
        state = states.initialize(setup)
        rows = sharding.sharding(mesh, ('batch', 'length'))
        batch = pipeline.to_global(random_rows(cfg), rows)
        begin = time.perf_counter()
        step = compile_step(setup, state, batch)
        compile_seconds = time.perf_counter() - begin
        state, _, _ = run(step, state, batch, WARMUP_STEPS)
        state, one, _ = run(step, state, batch, 1)
        count = min(MOST, max(LEAST, round(SECONDS / one)))
        state, seconds, loss = run(step, state, batch, count)
        require(math.isfinite(loss), f'loss {loss} after {count} steps: their time says nothing.')
        with jax.profiler.trace(profile):
            run(step, state, batch, PROFILED_STEPS)
        where = time_of_a_card(Path(profile))
    memory: Any = step.compiled.memory_analysis()
    peak = max((d.memory_stats() or {}).get('peak_bytes_in_use', 0) for d in devices)
    return {
        **speed(cfg, num_devices, seconds / count),
        'peak_gib': peak / GIB,
        'temp_gib': memory.temp_size_in_bytes / GIB,
        'compile_seconds': compile_seconds,
        'steps': count,
        'loss': loss,
        **where,
        'device': devices[0].device_kind,
        'jax': jax.__version__,
    }


def run(
    step: CompiledStep, state: states.TrainState, batch: pipeline.Batch, count: int
) -> tuple[states.TrainState, float, float]:
    """Runs steps on one batch; returns the state, the seconds of all of them, the last loss."""
    begin = time.perf_counter()
    for _ in range(count):
        state, metrics = step.run(state, batch)
    jax.block_until_ready(state)
    return state, time.perf_counter() - begin, float(metrics['loss'])


def speed(cfg: config.Config, num_devices: int, step_seconds: float) -> dict[str, float]:
    """Computes tokens a second of a device, and MFU: NaN on a device of unknown peak."""
    rate = cfg.train.batch_rows * cfg.data.row_length / num_devices / step_seconds
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    return {
        'step_ms': 1e3 * step_seconds,
        'card_tokens_per_second': rate,
        'mfu': rate * flops.flops_per_token(cfg.model, cfg.data.row_length) / peak,
    }


def time_of_a_card(profile: Path) -> dict[str, Any]:
    """Sums up a profile: milliseconds of a step, mean over the cards; {} where it has none."""
    cards = [events for events in trace.card_events(profile) if events]
    if not cards:
        return {}
    each = 1e3 / PROFILED_STEPS / len(cards)
    kinds = trace.by_kind(trace.kernel_seconds(profile))
    found = [trace.waiting(events) for events in cards]
    names = sorted({name for one in found for name in one.collectives})
    of = lambda name, at: each * sum(one.collectives.get(name, (0.0, 0.0))[at] for one in found)
    return {
        'kernel_ms': {kind: each * seconds for kind, seconds in kinds.items()},
        'collective_ms': {name: {'all': of(name, 0), 'exposed': of(name, 1)} for name in names},
        'exposed_ms': each * sum(one.exposed for one in found),
        'idle_ms': each * sum(one.idle for one in found),
        'profiled_ms': each * sum(one.span for one in found),
    }
