"""FP8 storage in training: what it does to gradients, and to the loss."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from helios_jax import config
from helios_jax.arch.tensors import TENSORS
from helios_jax.data import pipeline, tokenizer
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.train import state as states
from helios_jax.train.step import gradient, make_train_step

STEPS, LAST, SEEDS = 300, 50, (0, 1, 2)


def tiny(policy: str = 'minimal', seed: int = 0) -> config.Config:
    """The shipped config in bfloat16."""
    shipped = config.from_dict(importlib.import_module('helios_jax.configs.tiny').get_config())
    changes = {
        'model.compute_dtype': 'bfloat16',
        'train.seed': seed,
        'train.num_steps': STEPS,
        'memory': config.Memory(policy),
    }
    return config.replace(shipped, changes)


@contextlib.contextmanager
def started(cfg: config.Config) -> Iterator[tuple[states.Setup, states.TrainState, Iterator]]:
    """A run's setup, its initial state and its batches, under its mesh of one device."""
    encoder = tokenizer.load(cfg.data.tokenizer)
    cfg = cfg.resolve(encoder.vocab_size)
    mesh = meshes.make(cfg.mesh, jax.devices()[:1])
    setup = states.create(cfg, mesh)
    data = pipeline.prepare(cfg.data, encoder)
    batches = pipeline.train_batches(data, batch_rows=cfg.train.batch_rows, seed=cfg.train.seed)
    rows = sharding.sharding(mesh, ('batch', 'length'))
    with jax.set_mesh(mesh):
        yield setup, states.initialize(setup), (pipeline.to_global(b, rows) for b in batches)


def last_loss(cfg: config.Config) -> float:
    """Mean training loss of the last steps."""
    losses = []
    with started(cfg) as (setup, state, batches):
        step = jax.jit(make_train_step(setup), donate_argnums=0)
        for _ in range(STEPS):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics['loss']))
    return float(np.mean(losses[-LAST:]))


def gradients(setup: states.Setup, state: states.TrainState, batch: Any, memory: config.Memory):
    """Of the run's next step, under another policy."""
    cfg = dataclasses.replace(setup.config, memory=memory)
    other = dataclasses.replace(setup, config=cfg, model=setup.model.clone(memory=memory))
    return jax.jit(lambda state: gradient(other, state, batch)[0])(state)


@pytest.mark.slow
@pytest.mark.parametrize('steps', [0, pytest.param(100, marks=pytest.mark.long)])
def test_fp8_of_everything_turns_no_gradient(steps):
    """On text, against `none`; before training, and while the loss falls fast."""
    formed = [tensor.name for tensor in TENSORS.values() if not tensor.exact]
    fp8 = config.Memory('fp8', actions=config.Actions(**dict.fromkeys(formed, 'fp8')))
    with started(tiny()) as (setup, state, batches):
        step = jax.jit(make_train_step(setup))
        for _ in range(steps):
            state, _ = step(state, next(batches))
        batch = next(batches)
        exact = gradients(setup, state, batch, config.Memory('none'))
        rounded = gradients(setup, state, batch, fp8)
        for (path, e), r in zip(
            jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(rounded), strict=True
        ):
            e, r = (np.asarray(x, np.float64).ravel() for x in (e, r))
            if np.any(e):
                cosine = e @ r / np.sqrt((e @ e) * (r @ r))
                assert cosine >= 0.998, (jax.tree_util.keystr(path), cosine)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_loss_stays_within_the_noise_of_seeds():
    losses = {
        (name, seed): last_loss(tiny(name, seed)) for name in ('minimal', 'fp8') for seed in SEEDS
    }
    exact, rounded = (np.array([losses[p, s] for s in SEEDS]) for p in ('minimal', 'fp8'))
    gap = abs(np.mean(rounded - exact))
    assert gap < 0.003, losses
    assert gap < np.std(exact, ddof=1), losses
