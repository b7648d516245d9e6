"""Training state: the arrays that a step reads and replaces, and where each of them lives."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from helios_jax import config
from helios_jax.arch import rules
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import sharding
from helios_jax.train import optimizer


class TrainState(flax.struct.PyTreeNode):
    step: Any  # updates made, an int32 scalar
    params: PyTree  # float32
    optimizer: PyTree  # optax's state
    router: PyTree  # balance bias of each MoE layer; not trained by gradient
    # Running average of params, float32; no arrays at all unless train.ema is set.
    ema: PyTree = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that a step is made from; holds no arrays."""

    config: config.Config
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    model: Transformer
    optimizer: optax.GradientTransformation
    axes: PyTree  # logical axes of each parameter
    state: TrainState  # a tree of ShapeDtypeStructs with shardings


def create(
    cfg: config.Config,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    platform: str = '',
) -> Setup:
    """Builds the model and the optimizer and decides where every array lives, computing nothing.

    Args:
      cfg: resolved (`Config.resolve`).
      platform: to compile for, where it is not the running one.
    Raises:
      UserError: the mesh does not divide a weight or the batch.
    """
    rules.check_batch(cfg, mesh)
    model = Transformer(cfg.model, cfg.memory, platform)
    boxed = abstract_variables(model)
    variables = nn.unbox(boxed)
    axes = sharding.logical_axes(boxed)
    shardings = sharding.tree_shardings(mesh, axes, variables)
    tx = optimizer.make(cfg.optimizer, cfg.train.num_steps, axes['params'])
    moments = jax.eval_shape(tx.init, variables['params'])
    of_params = in_memory(cfg.memory.parameters, shardings['params'])
    beside_moments = in_memory(cfg.memory.optimizer, shardings['params'])
    of_moments = optimizer.state_shardings(moments, beside_moments)
    place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
    state = TrainState(
        step=place(jax.ShapeDtypeStruct((), jnp.int32), sharding.sharding(mesh, ())),
        params=jax.tree.map(place, variables['params'], of_params),
        optimizer=jax.tree.map(place, moments, of_moments),
        router=jax.tree.map(place, variables.get('router', {}), shardings.get('router', {})),
        ema=jax.tree.map(place, variables['params'], beside_moments) if cfg.train.ema else {},
    )
    return Setup(cfg, mesh, model, tx, axes['params'], state)


def in_memory(kind: str, shardings: PyTree) -> PyTree:
    """Moves shardings to the memory of the devices or of their host."""
    if kind == 'device':
        return shardings
    return jax.tree.map(lambda where: where.with_memory_kind('pinned_host'), shardings)


def initialize(setup: Setup) -> TrainState:
    """Makes a fresh state, each array where it lives."""

    def init() -> TrainState:
        tokens = jnp.zeros((1, 2), jnp.int32)
        key = jax.random.key(setup.config.train.seed)
        variables = nn.unbox(setup.model.init(key, tokens, tokens))
        params = variables['params']
        return TrainState(
            jnp.zeros((), jnp.int32),
            params,
            setup.optimizer.init(params),
            variables.get('router', {}),
            params if setup.config.train.ema else {},
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    return jax.jit(init, out_shardings=shardings)()
