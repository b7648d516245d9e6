"""Measures training speed on real text, and PyTorch's in the same run.

    helios bench train --config=helios_1b --config.data.tokenizer=tokenizer.json --peer

Each variant (GMU kind × packing) runs in a process of its own, so that none inherits another's
memory, and reports tokens/s, MFU, peak memory and where the time goes: of each kind of kernel the
milliseconds of a step, beside those that its bytes or its FLOPs take at least (floors.py).
"""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from helios_jax import chips, config, options, process
from helios_jax.bench import floors, torch_peer, trace
from helios_jax.data import pipeline, tokenizer
from helios_jax.memory import hlo
from helios_jax.parallel import cluster, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states
from helios_jax.train import throughput
from helios_jax.train.step import CompiledStep, Metrics, compile_step, few_documents

GIB = 2**30


def measure_training(
    values: dict[str, Any], warmup_steps: int, profiled_steps: int
) -> dict[str, Any]:
    """Runs `train.num_steps` steps after the warm-up, timed all together, and then a profile.

    Args:
      values: the config as nested mappings.
    """
    cfg = config.from_dict(values)
    cluster.start()
    mesh = meshes.make(cfg.mesh)
    encoder = tokenizer.load(cfg.data.tokenizer, chat_setting=cfg.data.chat_template)
    cfg = cfg.resolve(encoder.vocab_size)
    setup = states.create(cfg, mesh)
    data = pipeline.prepare(cfg.data, encoder)
    rows = sharding.sharding(mesh, ('batch', 'length'))
    batches = pipeline.train_batches(data, batch_rows=cfg.train.batch_rows, seed=cfg.train.seed)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as profile:
        programs: dict[bool, CompiledStep] = {}
        losses, start, seconds = [], 0.0, 0.0
        profiled: list[Metrics] = []
        speed = throughput.Throughput(cfg, throughput.peak_flops())
        total = warmup_steps + cfg.train.num_steps
        # Rows are read beforehand, and with them which programs there must be. The first run of a
        # program takes a second more, and is not on the clock.
        own = list(itertools.islice(batches, total + profiled_steps))
        for few in sorted({few_documents(cfg.data, batch) for batch in own}):
            example = pipeline.to_global(own[0], rows)
            state = states.initialize(setup)
            programs[few] = compile_step(setup, state, example, few=few)
            jax.block_until_ready(programs[few].run(state, example))
        state = states.initialize(setup)
        for count, batch in enumerate(own):
            if count in (warmup_steps, total):
                jax.block_until_ready(state)
                seconds, start = time.perf_counter() - start, time.perf_counter()
            if count == total:
                jax.profiler.start_trace(profile)
            step = programs[few_documents(cfg.data, batch)]
            state, metrics = step.run(state, pipeline.to_global(batch, rows))
            losses.append(metrics['loss'])
            if warmup_steps <= count < total:
                speed.add(metrics)
            if count >= total:
                profiled.append(metrics)
        jax.block_until_ready(state)
        kernels: dict[str, float] = {}
        gaps: dict[str, floors.Gap] = {}
        each = 1e3 / max(1, profiled_steps) / jax.local_device_count()  # of a step and a card
        if profiled_steps:
            jax.profiler.stop_trace()
            kernels = trace.kernel_seconds(Path(profile))
            gaps = beside_floors(cfg, Path(profile), programs.values(), profiled, each)
        else:
            seconds = time.perf_counter() - start
    device = jax.devices()[0]
    temporary: list[Any] = [step.compiled.memory_analysis() for step in programs.values()]
    return {
        'kind': cfg.model.gmu.kind,
        'packing': cfg.data.packing,
        'policy': cfg.memory.policy,
        **speed.figures(seconds),
        'step_ms': 1e3 * seconds / cfg.train.num_steps,
        'losses': [float(loss) for loss in losses],
        'state_gib': gib_of(state),
        'peak_gib': (device.memory_stats() or {}).get('peak_bytes_in_use', 0) / GIB,
        'temp_gib': max(memory.temp_size_in_bytes for memory in temporary) / GIB,
        'kernel_floors': gaps,
        'kernel_ms': {k: each * s for k, s in trace.by_kind(kernels).items()},
        'top_kernels_ms': {n[:80]: each * s for n, s in list(kernels.items())[:25]},
        'device': device.device_kind,
        'jax': jax.__version__,
    }


def beside_floors(
    cfg: config.Config,
    profile: Path,
    programs: Iterable[CompiledStep],
    steps: Sequence[Metrics],
    each: float,
) -> dict[str, floors.Gap]:
    """Puts the kernels of a profile beside their floors, by the rates of this run's devices.

    Args:
      programs: those that the profiled steps are runs of.
      steps: metrics of the profiled steps.
      each: as `floors.compare` takes it.
    Returns:
      rows of `floors.compare`; none where no kernels were seen. Of a device that chips.py lacks no
      floor is known.
    """
    events = [event for card in trace.card_events(profile) for event in card]
    chip = chips.find(jax.devices()[0].device_kind)
    needs: floors.AllNeeds = {}
    if events and chip:
        texts = [hlo.text(step.compiled) for step in programs]
        needs = floors.of_programs(texts, keys_seen(cfg, steps))
    return floors.compare(events, needs, chip.ceilings if chip else (math.inf, math.inf), each)


def keys_seen(cfg: config.Config, steps: Sequence[Metrics]) -> floors.SeenKeys:
    """Counts the keys that a query of these steps' rows saw, on average."""
    queries = cfg.train.batch_rows * cfg.data.row_length * len(steps)
    seen = lambda name: sum(float(m['tokens'] * m[name]) for m in steps if name in m) / queries
    return floors.SeenKeys(seen('mean_context'), seen('mean_window_context'))


def gib_of(state: states.TrainState) -> dict[str, float]:
    """Adds up the GiB of the training state in each memory that it lies in."""
    total: dict[str, float] = {}
    for leaf in jax.tree.leaves(state):
        kind = leaf.sharding.memory_kind
        total[kind] = total.get(kind, 0.0) + leaf.nbytes / GIB
    return total


def compare_training(
    cfg: config.Config,
    *,
    kinds: Sequence[str],
    packings: Sequence[str],
    warmup_steps: int,
    profiled_steps: int,
    with_peer: bool,
    as_json: bool,
) -> None:
    """Measures and prints the config with each GMU kind and packing.

    Raises:
      UserError: a kind or a packing is none, or PyTorch has no such model, before anything is
        measured; a measurement failed.
    """
    variants = [variant(cfg, kind, packing) for packing in packings for kind in kinds]
    same = torch_peer.same_shape(cfg) if with_peer else None
    rows = []
    for values in map(dataclasses.asdict, variants):
        rows.append(process.run(measure_training, values, warmup_steps, profiled_steps))
        print(options.to_json(rows[-1]), flush=True)
    peer: dict[str, Any] = {}
    if same:
        peer = process.run(torch_peer.measure_peer, dataclasses.asdict(same))
        print(options.to_json(peer), flush=True)
    if not as_json:
        for row in rows:
            print('\n'.join([describe(row, peer), *floors.lines(row['kernel_floors'])]))


def variant(cfg: config.Config, kind: str, packing: str) -> config.Config:
    """Gives a config another GMU kind and packing."""
    return config.replace(cfg, {'model.gmu.kind': kind, 'data.packing': packing})


def describe(row: dict[str, Any], peer: dict[str, Any]) -> str:
    """Writes a variant's row as a line, with its speed by the peer's where that was measured."""
    line = (
        f'{row["kind"]:10} {row["packing"]:12} {row["tokens_per_second"]:9,.0f} tok/s  '
        f'MFU {row["mfu"]:.3f} ({row["segment_mfu"]:.3f} by segments)  {row["peak_gib"]:.1f} GiB'
    )
    if not peer:
        return line
    return f'{line}  {row["tokens_per_second"] / peer["tokens_per_second"]:.2f} × PyTorch'
