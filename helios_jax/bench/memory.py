"""Measures what memory policies cost and save: one model's loss and gradient, policy by policy.

    helios bench memory --config=bench_memory

Each policy runs in a process of its own, so that none inherits another's memory. A row holds the
compiler's bytes, the allocator's peak, the time of a step (loss and gradient, no optimizer), the
loss, and the least cosine of a parameter's gradient with that under the first policy that ran. The
batch is the first of the config's data, the parameters are initial ones.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import config, options, process
from helios_jax.data import pipeline, tokenizer
from helios_jax.errors import UserError, require
from helios_jax.memory import evidence
from helios_jax.parallel import cluster, platforms, sharding
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states
from helios_jax.train.step import compiler_options_of, gradient

WARMUP_STEPS, STEPS = 2, 5
GIB = 2**30


def measure_policy(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Measures the memory policy of a config, given as nested mappings.

    The first policy writes its gradients into the directory, the others compare theirs with those.
    """
    cfg, reference = config.from_dict(values), Path(directory) / 'gradients'
    cluster.start()
    mesh = meshes.make(cfg.mesh)
    encoder = tokenizer.load(cfg.data.tokenizer, chat_setting=cfg.data.chat_template)
    cfg = cfg.resolve(encoder.vocab_size)
    setup = states.create(cfg, mesh)
    data = pipeline.prepare(cfg.data, encoder)
    first = next(pipeline.train_batches(data, batch_rows=cfg.train.batch_rows, seed=0))
    with jax.set_mesh(mesh):
        state = start(setup)
        batch = pipeline.to_global(first, sharding.sharding(mesh, ('batch', 'length')))
        traced = jax.jit(lambda state, batch: gradient(setup, state, batch)[:2]).trace(state, batch)
        options = compiler_options_of(cfg, jax.local_devices()[0], mesh.size)
        begin = time.perf_counter()
        compiled = traced.lower().compile(options)
        seconds = time.perf_counter() - begin
        host = platforms.has_host_memory()
        saved = evidence.verified(cfg.memory, traced, compiled, host=host)
        row = {'device': jax.devices()[0].device_kind, 'jax': jax.__version__}
        row |= bytes_of(compiled, evidence.rows(saved, host=host)) | {'compile_seconds': seconds}
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
    """Makes initial parameters, without the optimizer's moments: a gradient does not read them."""

    def init() -> tuple[Any, Any]:
        tokens = jnp.zeros((1, 2), jnp.int32)
        variables = nn.unbox(setup.model.init(jax.random.key(0), tokens, tokens))
        return variables['params'], variables.get('router', {})

    places = jax.tree.map(lambda leaf: leaf.sharding, (setup.state.params, setup.state.router))
    params, router = jax.jit(init, out_shardings=places)()
    return states.TrainState(jnp.zeros((), jnp.int32), params, (), router)


def bytes_of(compiled: jax.stages.Compiled, table: list[dict[str, Any]]) -> dict[str, Any]:
    """Collects GiB: what is saved for backward by the table of saved tensors, and temporaries."""
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
    """Times the steps: milliseconds of the median and of the fastest one."""
    times = []
    for _ in range(WARMUP_STEPS + STEPS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(state, batch))
        times.append(1e3 * (time.perf_counter() - begin))
    times = sorted(times[WARMUP_STEPS:])
    return {'step_ms': times[len(times) // 2], 'fastest_ms': times[0]}


def write(gradients: Any, reference: Path) -> None:
    """Writes each gradient in float32, a file a parameter."""
    reference.mkdir()
    for i, leaf in enumerate(jax.tree.leaves(gradients)):
        np.save(reference / f'{i}.npy', np.asarray(leaf, np.float32))


def cosines(gradients: Any, reference: Path) -> dict[str, Any]:
    """Finds the least cosine of a parameter's gradient with the reference's, and that parameter."""
    found = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(gradients)):
        one, other = leaf.astype(jnp.float32), jnp.asarray(np.load(reference / f'{i}.npy'))
        dot, size, own = (jnp.sum(a * b) for a, b in ((one, other), (other, other), (one, one)))
        if float(size):
            cosine = float(dot / jnp.sqrt(size * own))
            found.append((cosine, jax.tree_util.keystr(path, simple=True, separator='.')))
    least, name = min(found)
    return {'least_cosine': least, 'of_parameter': name}


def with_policy(cfg: config.Config, name: str) -> config.Config:
    """Gives a config a preset, and what differs from it: `full:backward_parts=4:gate_up=fp8`.

    Raises:
      UserError: no such preset, tensor or action; backward_parts is no whole number.
    """
    policy, *others = name.split(':')
    values = dataclasses.asdict(cfg)
    memory = values['memory'] | {'policy': policy}
    for other in others:
        setting, _, value = other.partition('=')
        if setting != 'backward_parts':
            memory['actions'][setting] = value
            continue
        require(value.isdecimal(), f'--policies={name}: backward_parts must be a whole number.')
        memory['backward_parts'] = int(value)
    return config.from_dict(values | {'memory': memory})


def compare_policies(cfg: config.Config, policies: Sequence[str], *, as_json: bool) -> None:
    """Measures and prints every policy; one that does not fit is a row that says so.

    Raises:
      UserError: a policy is none, before anything is measured.
    """
    variants = {name: with_policy(cfg, name) for name in policies}
    with tempfile.TemporaryDirectory() as directory:
        for name, variant in variants.items():
            row: dict[str, Any] = {'policy': name}
            values = dataclasses.asdict(variant)
            try:
                row |= process.run(measure_policy, values, directory, quiet=True)
            except UserError as error:
                row['failed'] = str(error)[:300]
            print(options.to_json(row) if as_json else describe(row), flush=True)


def describe(row: dict[str, Any]) -> str:
    """Writes a policy's row as a line."""
    if 'failed' in row:
        temp = f'temp {row["temp_gib"]:6.2f}  ' if 'temp_gib' in row else ''
        return f'{row["policy"]:24} {temp}failed: {row["failed"]}'
    cosine = f'{row["least_cosine"]:.5f} ({row["of_parameter"]})' if 'least_cosine' in row else '—'
    return (
        f'{row["policy"]:24} saved {row["saved_gib"]:6.2f} GiB, host {row["saved_host_gib"]:5.2f}  '
        f'temp {row["temp_gib"]:6.2f}  peak {row["peak_gib"]:6.2f}  step {row["step_ms"]:7.1f} ms  '
        f'loss {row["loss"]:.6f} ({row["loss_bits"]})  least cosine {cosine}'
    )
