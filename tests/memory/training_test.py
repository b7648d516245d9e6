"""FP8 storage in training: what it does to the loss, against the noise of seeds."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from helios_jax import config
from helios_jax.data import pipeline, tokenizer
from helios_jax.parallel import mesh as meshes
from helios_jax.parallel import sharding
from helios_jax.train import state as states
from helios_jax.train.step import make_train_step

STEPS, LAST, SEEDS = 300, 50, (0, 1, 2)


def last_loss(cfg: config.Config) -> float:
    """Mean training loss of the last steps."""
    encoder = tokenizer.load(cfg.data.tokenizer)
    cfg = cfg.resolve(encoder.vocab_size)
    mesh = meshes.make(cfg.mesh, jax.devices()[:1])
    setup = states.create(cfg, mesh)
    data = pipeline.prepare(cfg.data, encoder)
    batches = pipeline.train_batches(data, batch_rows=cfg.train.batch_rows, seed=cfg.train.seed)
    rows, losses = sharding.sharding(mesh, ('batch', 'length')), []
    with jax.set_mesh(mesh):
        state = states.initialize(setup)
        step = jax.jit(make_train_step(setup), donate_argnums=0)
        for _ in range(STEPS):
            state, metrics = step(state, pipeline.to_global(next(batches), rows))
            losses.append(float(metrics['loss']))
    return float(np.mean(losses[-LAST:]))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_loss_stays_within_the_noise_of_seeds():
    tiny = config.from_dict(importlib.import_module('helios_jax.configs.tiny').get_config())
    losses = {}
    for policy in ('minimal', 'fp8'):
        for seed in SEEDS:
            model = dataclasses.replace(tiny.model, compute_dtype='bfloat16')
            train = dataclasses.replace(tiny.train, seed=seed, num_steps=STEPS)
            memory = config.Memory(policy)
            cfg = dataclasses.replace(tiny, model=model, train=train, memory=memory)
            losses[policy, seed] = last_loss(cfg)
    exact, rounded = (np.array([losses[p, s] for s in SEEDS]) for p in ('minimal', 'fp8'))
    gap = abs(np.mean(rounded - exact))
    assert gap < 0.003, losses
    assert gap < np.std(exact, ddof=1), losses
