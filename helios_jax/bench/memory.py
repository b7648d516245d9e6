"""What each memory policy costs and saves: one model's loss and gradient, policy by policy.

    helios bench memory --config=helios_1b --policies=none,minimal,fp8,full,offload,fp8_offload

Each policy runs in a process of its own, so that none inherits another's memory: the compiler's
bytes, the allocator's peak, the time of a step (loss and gradient, no optimizer), the loss and the
cosine of every parameter's gradient with that of the first policy that runs. The batch is the first
of the config's data, the parameters are initial ones.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import config
from helios_jax.data import pipeline, tokenizer
from helios_jax.memory import proof, store
from helios_jax.parallel import cluster, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states
from helios_jax.train.step import gradient

WARMUP_STEPS, STEPS = 2, 5
GIB = 2**30


def measure(cfg: config.Config, reference: Path) -> dict[str, Any]:
    """One policy. The first writes its gradients to `reference`, the others compare with them."""
    cluster.start()
    mesh = meshes.make(cfg.mesh)
    encoder = tokenizer.load(cfg.data.tokenizer)
    cfg = cfg.resolve(encoder.vocab_size)
    setup = states.create(cfg, mesh)
    data = pipeline.prepare(cfg.data, encoder)
    first = next(pipeline.train_batches(data, batch_rows=cfg.train.batch_rows, seed=0))
    with jax.set_mesh(mesh):
        state = start(setup)
        batch = pipeline.to_global(first, sharding.sharding(mesh, ('batch', 'length')))
        traced = jax.jit(lambda state, batch: gradient(setup, state, batch)[:2]).trace(state, batch)
        begin = time.perf_counter()
        compiled = traced.lower().compile(store.compiler_options(cfg.memory))
        seconds = time.perf_counter() - begin
        saved = proof.saved(traced.jaxpr, mesh.size)
        host = proof.has_host_memory('')
        proof.check(cfg.memory, saved, proof.program(compiled), host=host)
        row = {'device': jax.devices()[0].device_kind, 'jax': jax.__version__}
        row |= bytes_of(compiled, proof.rows(saved, host=host)) | {'compile_seconds': seconds}
        try:
            row |= timed(compiled, state, batch)
        except jax.errors.JaxRuntimeError as error:
            return row | {'failed': f'compiled, but does not run: {str(error).splitlines()[0]}'}
        gradients, metrics = compiled(state, batch)
        loss = np.asarray(metrics['loss'])
        peak = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)
        row |= {'loss': float(loss), 'loss_bits': loss.tobytes().hex(), 'peak_gib': peak / GIB}
        if reference.exists():
            row |= cosines(gradients, reference)
        else:
            write(gradients, reference)
    return row


def start(setup: states.Setup) -> states.TrainState:
    """Initial parameters without moments, which a gradient does not read."""

    def init() -> tuple[Any, Any]:
        tokens = jnp.zeros((1, 2), jnp.int32)
        variables = nn.unbox(setup.model.init(jax.random.key(0), tokens, tokens))
        return variables['params'], variables.get('router', {})

    places = jax.tree.map(lambda leaf: leaf.sharding, (setup.state.params, setup.state.router))
    params, router = jax.jit(init, out_shardings=places)()
    return states.TrainState(jnp.zeros((), jnp.int32), params, (), router)


def bytes_of(compiled: jax.stages.Compiled, table: list[dict[str, Any]]) -> dict[str, Any]:
    memory: Any = compiled.memory_analysis()
    return {
        'saved_gib': sum(row['device_bytes'] for row in table) / GIB,
        'saved_host_gib': sum(row['host_bytes'] for row in table) / GIB,
        'temp_gib': memory.temp_size_in_bytes / GIB,
        'host_temp_gib': memory.host_temp_size_in_bytes / GIB,
        'saved': {
            row['name']: [row['action'], (row['device_bytes'] + row['host_bytes']) / GIB]
            for row in table
        },
    }


def timed(compiled: Any, state: states.TrainState, batch: pipeline.Batch) -> dict[str, float]:
    """Milliseconds of the fastest and of the median step."""
    times = []
    for _ in range(WARMUP_STEPS + STEPS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(state, batch))
        times.append(1e3 * (time.perf_counter() - begin))
    times = sorted(times[WARMUP_STEPS:])
    return {'step_ms': times[len(times) // 2], 'fastest_ms': times[0]}


def write(gradients: Any, reference: Path) -> None:
    """Each gradient in float32, a file a parameter."""
    reference.mkdir()
    for i, leaf in enumerate(jax.tree.leaves(gradients)):
        np.save(reference / f'{i}.npy', np.asarray(leaf, np.float32))


def cosines(gradients: Any, reference: Path) -> dict[str, Any]:
    """The least cosine of a parameter's gradient with the reference's, and that parameter."""
    found = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(gradients)):
        one, other = leaf.astype(jnp.float32), jnp.asarray(np.load(reference / f'{i}.npy'))
        dot, size, own = (jnp.sum(a * b) for a, b in ((one, other), (other, other), (one, one)))
        if float(size):
            cosine = float(dot / jnp.sqrt(size * own))
            found.append((cosine, jax.tree_util.keystr(path, simple=True, separator='.')))
    least, name = min(found)
    return {'least_cosine': least, 'of_parameter': name}


def compare(argv: Sequence[str], policies: Sequence[str], *, as_json: bool) -> None:
    """Measures and prints every policy; one that does not fit is a row that says so."""
    with tempfile.TemporaryDirectory() as directory:
        reference = Path(directory) / 'gradients'
        for name in policies:
            command = [sys.executable, '-m', 'helios_jax', 'bench', 'memory', *argv]
            policy, *others = name.split(':')
            flags = [f'--config.memory.policy={policy}', f'--here={reference}']
            for other in others:
                section = '' if other.startswith('backward_parts=') else 'actions.'
                flags.append(f'--config.memory.{section}{other}')
            done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
            row: dict[str, Any] = {'policy': name}
            if done.returncode:
                reason = [line for line in done.stderr.splitlines() if line.strip()][-1:]
                row['failed'] = ' '.join(reason)[:300]
            else:
                row |= json.loads(done.stdout.strip().splitlines()[-1])
            print(json.dumps(row) if as_json else text(row), flush=True)


def text(row: dict[str, Any]) -> str:
    if 'failed' in row:
        temp = f'temp {row["temp_gib"]:6.2f}  ' if 'temp_gib' in row else ''
        return f'{row["policy"]:24} {temp}failed: {row["failed"]}'
    cosine = f'{row["least_cosine"]:.5f} ({row["of_parameter"]})' if 'least_cosine' in row else '—'
    return (
        f'{row["policy"]:24} saved {row["saved_gib"]:6.2f} GiB, host {row["saved_host_gib"]:5.2f}  '
        f'temp {row["temp_gib"]:6.2f}  peak {row["peak_gib"]:6.2f}  step {row["step_ms"]:7.1f} ms  '
        f'loss {row["loss"]:.6f} ({row["loss_bits"]})  least cosine {cosine}'
    )
