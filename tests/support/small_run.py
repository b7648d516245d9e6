"""A config that trains in seconds, on text that it writes, and what its runs leave."""

import json
import random
from pathlib import Path

import jax

from helios_jax import checkpoint, config
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states


def write_corpus(directory: Path) -> str:
    """Forty short files; returns their glob."""
    directory.mkdir()
    rng = random.Random(0)
    for number in range(40):
        words = [rng.choice(['alpha', 'beta', 'gamma\n', 'δ']) for _ in range(rng.randrange(5, 60))]
        (directory / f'{number:02}.txt').write_text(f'{number} ' + ' '.join(words))
    return str(directory / '*.txt')


def make_config(root: Path) -> config.Config:
    """30 steps over a few kilobytes of text below `root`, every figure of every step recorded."""
    return config.Config(
        model=config.Model(
            num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=6, mlp_dim=24,
            compute_dtype='float32',
        ),
        data=config.Data(
            corpus=write_corpus(root / 'text'), row_length=32, validation_fraction=0.2,
            cache_dir=str(root / 'cache'), num_workers=1,
        ),
        optimizer=config.Optimizer(learning_rate=1e-2, warmup_steps=3),
        train=config.Train(
            num_steps=30, batch_rows=8, log_every=1, eval_every=7, eval_rows=11,
            checkpoint_every=5, tensorboard=False, compilation_cache='',
        ),
        memory=config.Memory(policy='none'),
    )  # fmt: skip


def write_config(cfg: config.Config, path: Path) -> Path:
    """The config as a file for --config."""
    path.write_text(
        f'from helios_jax.config import *\n\ndef get_config():\n    return to_dict({cfg!r})\n'
    )
    return path


def recorded(workdir: Path) -> list[dict]:
    """The metric lines without what the clock says."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{n: v for n, v in line.items() if not n.startswith('time/')} for line in lines]


def saved(cfg: config.Config, workdir: Path, step: int) -> dict:
    """Parameters and optimizer state of a checkpoint, on the host."""
    cfg = cfg.resolve(256)
    setup = states.create(cfg, meshes.make(config.Mesh(), jax.devices()[:1]))
    items = {'params': setup.state.params, 'optimizer': setup.state.optimizer}
    directory = workdir / 'checkpoints'
    return {
        name: jax.device_get(checkpoint.open_step(directory, step).restore(name, tree))
        for name, tree in items.items()
    }
