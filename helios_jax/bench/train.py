"""Training speed on real text, beside PyTorch's in the same run.

    helios bench train --config=helios_1b --config.data.tokenizer=tokenizer.json --peer

Each variant (GMU kind × packing) runs in a process of its own, so that none inherits another's
memory, and reports tokens/s, MFU, peak memory and where the time goes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from helios_jax import config
from helios_jax.bench import trace
from helios_jax.data import pipeline, tokenizer
from helios_jax.parallel import cluster, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states
from helios_jax.train import throughput
from helios_jax.train.step import compile_step

GIB = 2**30


def measure(cfg: config.Config, warmup_steps: int, profiled_steps: int) -> dict[str, Any]:
    """Runs `train.num_steps` steps after the warm-up, timed all together, and then a profile."""
    cluster.start()
    mesh = meshes.make(cfg.mesh)
    encoder = tokenizer.load(cfg.data.tokenizer)
    cfg = cfg.resolve(encoder.vocab_size)
    setup = states.create(cfg, mesh)
    data = pipeline.prepare(cfg.data, encoder)
    rows = sharding.sharding(mesh, ('batch', 'length'))
    batches = pipeline.train_batches(data, batch_rows=cfg.train.batch_rows, seed=cfg.train.seed)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as profile:
        state = states.initialize(setup)
        first = pipeline.to_global(next(batches), rows)
        step = compile_step(setup, state, first)
        losses, start, seconds = [], 0.0, 0.0
        speed = throughput.Throughput(cfg, throughput.peak_flops())
        total = warmup_steps + cfg.train.num_steps
        for count in range(total + profiled_steps):
            if count in (warmup_steps, total):
                jax.block_until_ready(state)
                seconds, start = time.perf_counter() - start, time.perf_counter()
            if count == total:
                jax.profiler.start_trace(profile)
            state, metrics = step.run(state, pipeline.to_global(next(batches), rows))
            losses.append(metrics['loss'])
            if warmup_steps <= count < total:
                speed.add(metrics)
        jax.block_until_ready(state)
        kernels: dict[str, float] = {}
        if profiled_steps:
            jax.profiler.stop_trace()
            kernels = trace.kernel_seconds(Path(profile))
        else:
            seconds = time.perf_counter() - start
    device = jax.devices()[0]
    memory: Any = step.compiled.memory_analysis()
    return {
        'kind': cfg.model.gmu.kind,
        'packing': cfg.data.packing,
        'policy': cfg.memory.policy,
        **speed.figures(seconds),
        'step_ms': 1e3 * seconds / cfg.train.num_steps,
        'losses': [float(loss) for loss in losses],
        'state_gib': gib_of(state),
        'peak_gib': (device.memory_stats() or {}).get('peak_bytes_in_use', 0) / GIB,
        'temp_gib': memory.temp_size_in_bytes / GIB,
        'kernel_ms': {k: 1e3 * s / profiled_steps for k, s in trace.by_kind(kernels).items()},
        'top_kernels_ms': {n[:80]: 1e3 * s / profiled_steps for n, s in list(kernels.items())[:25]},
        'device': device.device_kind,
        'jax': jax.__version__,
    }


def gib_of(state: states.TrainState) -> dict[str, float]:
    """GiB of the training state in each memory that it lies in."""
    total: dict[str, float] = {}
    for leaf in jax.tree.leaves(state):
        kind = leaf.sharding.memory_kind
        total[kind] = total.get(kind, 0.0) + leaf.nbytes / GIB
    return total


def compare(
    argv: Sequence[str],
    *,
    kinds: Sequence[str],
    packings: Sequence[str],
    with_peer: bool,
    as_json: bool,
) -> None:
    """Measures and prints every variant of the config that the flags `argv` describe."""
    rows = []
    for packing in packings:
        for kind in kinds:
            variant = [f'--config.model.gmu.kind={kind}', f'--config.data.packing={packing}']
            rows.append(_run(['helios_jax', 'bench', 'train', *argv, *variant, '--here']))
            print(json.dumps(rows[-1]), flush=True)
    peer = _run(['helios_jax', 'bench', 'torch_peer', '--json']) if with_peer else {}
    if peer:
        print(json.dumps(peer), flush=True)
    if as_json:
        return
    for row in rows:
        ratio = row['tokens_per_second'] / peer['tokens_per_second'] if peer else float('nan')
        print(
            f'{row["kind"]:10} {row["packing"]:12} {row["tokens_per_second"]:9,.0f} tok/s  '
            f'MFU {row["mfu"]:.3f} ({row["segment_mfu"]:.3f} by segments)  '
            f'{row["peak_gib"]:.1f} GiB  {ratio:.2f} × PyTorch'
        )


def _run(arguments: list[str]) -> dict[str, Any]:
    """The JSON that a process of its own prints last."""
    done = subprocess.run(
        [sys.executable, '-m', *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    config.require(
        done.returncode == 0 and bool(lines),
        f'measurement {" ".join(arguments)} ended with code {done.returncode}; see above.',
    )
    return json.loads(lines[-1])
