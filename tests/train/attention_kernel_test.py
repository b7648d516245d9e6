"""The train step with the TPU kernels, interpreted, is the step with the reference."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from helios_jax import config
from helios_jax.data.pipeline import Batch
from helios_jax.parallel import mesh as meshes
from helios_jax.train import state as states
from helios_jax.train import step as steps

B, T, V = 4, 136, 300
MODEL = config.Model(
    num_layers=2, embed_dim=24, num_heads=6, num_kv_heads=2, head_dim=32, mlp_dim=36,
    compute_dtype='float32',
)  # fmt: skip


def random_batch() -> Batch:
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 4, (B, T)), axis=1)[:, ::-1]  # zeros, the padding, come last
    ids = np.where(ids > 0, 4 - ids, 0).astype(np.int32)
    index = np.arange(T)
    first = np.array([[np.argmax(row == segment) for segment in row] for row in ids])
    return Batch(
        tokens=rng.integers(0, V, (B, T)).astype(np.int32),
        segment_ids=ids,
        positions=np.where(ids > 0, index - first, 0).astype(np.int32),
        loss_mask=ids > 0,
        num_bytes=np.zeros(B, np.int32),
    )


def gradients(implementation: str, platform: str, sizes: dict[str, int]) -> tuple:
    """(loss, gradients) of one batch on eight devices."""
    cfg = config.Config(
        model=dataclasses.replace(MODEL, attention=implementation),
        data=config.Data(row_length=T),
        train=config.Train(num_steps=2, batch_rows=B),
        memory=config.Memory(policy='none'),  # the interpreter's effects do not go through remat
    ).resolve(V)
    mesh = meshes.make(config.Mesh(**{'fsdp': 1} | sizes), jax.devices())
    with jax.set_mesh(mesh):
        setup = states.create(cfg, mesh, platform)
        state = states.initialize(setup)
        result = jax.jit(lambda state, batch: steps.gradient(setup, state, batch)[:2])(
            state, random_batch()
        )
        loss, grads = result[1]['loss'], result[0]
        return jax.device_get((loss, grads))


MESHES = [{'data': 4, 'tensor': 2}, {'data': 2, 'context': 2, 'tensor': 2}]


@pytest.mark.parametrize(
    'sizes',
    [
        pytest.param(MESHES[0], marks=pytest.mark.slow),
        pytest.param(MESHES[1], marks=pytest.mark.long),
    ],
)
def test_step_is_that_of_the_reference(sizes):
    expected = gradients('reference', '', sizes)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        actual = gradients('tpu', 'tpu', sizes)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(np.abs(want).max(), 1e-3))
