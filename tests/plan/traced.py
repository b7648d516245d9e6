"""What a small model's gradient really stores between forward and backward, read from its jaxpr."""

import collections
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from helios_jax import config
from helios_jax.memory.linearized import inner_jaxprs
from helios_jax.memory.store import MARK
from helios_jax.model.transformer import Transformer, abstract_variables
from helios_jax.parallel import mesh as meshes

Bytes = dict[tuple[str, str], int]  # (tensor, device or host) → of one device


def stored_bytes(cfg: config.Config, num_devices: int, platform: str) -> Bytes:
    """Bytes of each marked tensor on one device: shape × dtype × the scan that stacks it."""
    model = Transformer(cfg.model, cfg.memory, platform)
    variables = nn.unbox(abstract_variables(model))
    tokens = jax.ShapeDtypeStruct((cfg.train.batch_rows, cfg.data.row_length), jnp.int32)

    def loss(params: Any, router: Any, tokens: Any) -> Any:
        hidden, stats = model.apply({'params': params, 'router': router}, tokens, tokens, tokens)
        losses = [s.z_loss.sum() for group in stats.values() for s in group.values()]
        return hidden.astype(jnp.float32).sum() + sum(losses)

    with jax.sharding.use_abstract_mesh(meshes.abstract(cfg.mesh, num_devices)):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(
            variables['params'], variables.get('router', {}), tokens
        )
    found: Bytes = collections.Counter()
    _walk(jaxpr.jaxpr, num_devices, 1, found)
    return dict(found)


def _walk(jaxpr: Any, num_devices: int, layers: int, found: Bytes) -> None:
    made_by = {id(v): equation for equation in jaxpr.eqns for v in equation.outvars}
    for equation in jaxpr.eqns:
        name = equation.params.get('name', '') if equation.primitive.name == 'name' else ''
        if name.startswith(f'{MARK}/'):
            _, name, action, where = name.split('/')
            aval = equation.outvars[0].aval
            local = aval.shape
            if where == 'manual':
                local = (aval.shape[0] // num_devices, *aval.shape[1:])
            else:
                placed = made_by[id(equation.invars[0])]
                assert placed.primitive.name == 'sharding_constraint', placed
                local = placed.params['sharding'].shard_shape(aval.shape)
            place = 'host' if action.endswith('offload') else 'device'
            found[name, place] += layers * math.prod(local) * aval.dtype.itemsize
        length = equation.params['length'] if equation.primitive.name == 'scan' else 1
        for inner in inner_jaxprs(equation):
            _walk(inner, num_devices, layers * length, found)
