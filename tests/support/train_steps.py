"""A small model's settings, batches and meshes, for the tests of a training step."""

import dataclasses

import jax
import numpy as np

from helios_jax import config
from helios_jax.data.pipeline import Batch
from helios_jax.parallel import mesh as meshes

B, T, V = 16, 28, 300
# With a large eps an Adam update is nearly linear in the gradient. With a small one it is its sign:
# that hides errors of size, and turns rounding of tiny gradients into whole steps.
LINEAR = config.Optimizer(
    learning_rate=2.0, warmup_steps=0, eps=1.0, weight_decay=0.01, clip_norm=0.5
)
MUON = dataclasses.replace(LINEAR, name='muon', learning_rate=0.02)
PATTERNS = {
    'dense': {
        'period': 'dense', 'gmu': config.GMU(stream_scale='on', dwa='1x2'), 'norm_scale': 'depth',
        'value_residual': True,
    },
    'moe': {'prefix': 'dense', 'period': 'moe', 'gmu': config.GMU(embedding='on')},
}  # fmt: skip


def settings(pattern: str, **replaced) -> config.Config:
    moe = config.MoE(num_experts=12, num_experts_per_token=3, mlp_dim=20, num_shared_experts=1)
    model = config.Model(
        num_layers=2, embed_dim=24, num_heads=8, num_kv_heads=4, head_dim=6, mlp_dim=36,
        qk_norm=True, moe=moe, compute_dtype='float32', **PATTERNS[pattern],
    )  # fmt: skip
    cfg = config.Config(
        model=model,
        data=config.Data(row_length=T),
        optimizer=LINEAR,
        train=config.Train(num_steps=9, batch_rows=B, z_loss=1e-2),
        memory=config.Memory(policy='none'),
    )
    return dataclasses.replace(cfg, **replaced).resolve(V)


def random_batch(seed: int = 0) -> Batch:
    """Rows of up to three segments and very unequal padding; some rows are all padding."""
    rng = np.random.default_rng(seed)
    batch = Batch(
        tokens=np.zeros((B, T), np.int32),
        segment_ids=np.zeros((B, T), np.int32),
        positions=np.zeros((B, T), np.int32),
        loss_mask=np.zeros((B, T), np.bool_),
        num_bytes=np.zeros(B, np.int32),
    )
    for row in range(B):
        length = max(0, T - row) if row != 4 else 0
        cuts = sorted(rng.integers(0, length + 1, 2))
        for segment, (start, end) in enumerate(
            zip([0, *cuts], [*cuts, length], strict=True), start=1
        ):
            batch.segment_ids[row, start:end] = segment
            batch.positions[row, start:end] = np.arange(end - start)
        batch.tokens[row, :length] = rng.integers(0, V, length)
        batch.loss_mask[row, :length] = rng.random(length) < 0.8
    return batch


def mesh_of(sizes: dict[str, int], num_devices: int) -> jax.sharding.Mesh:
    return meshes.make(config.Mesh(**{'fsdp': 1} | sizes), jax.devices()[:num_devices])


def assert_close(actual, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        ),
        actual,
        expected,
    )
