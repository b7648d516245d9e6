"""Attention over a sequence split across devices: keys travel round a ring of them.

Each device keeps its queries. One block of keys after another arrives, is attended to by the same
kernel as on one device, and is sent on while that kernel runs. The blocks' results are merged by
their log-sum-exp. In the backward pass the gradients of a block of keys travel with it, and come
home with the last step.

A causal row cut into C consecutive pieces would leave the first device idle. `zigzag` gives device
i the pieces i and 2C−1−i of 2C instead: all its queries see the first half of the keys that come
from a device before it, and the second half of its queries sees all keys from a device after it. So
every device has the same work at every step, where the kernel skips what nobody sees. Positions and
segment ids say who sees what, and nothing else in a layer asks for the order of tokens: a model
arranges its rows once, where they enter (`zigzag_rows`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, PyTree, Shaped

from helios_jax.kernels.attention import Blockwise, Setting, Tokens
from helios_jax.parallel.sharding import constrain


class Keys(NamedTuple):
    """Keys of one device as they travel: few arrays, since XLA sends at most five at once."""

    k: Float[Array, 'B S K H']
    v: Float[Array, 'B S K H']
    tokens: Any  # int32 [2 B S]: the bits of the positions, and the segment ids; no gradient: None


def ring_attention(
    kernel: Blockwise,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    tokens: Tokens,
    setting: Setting,
    *,
    axis: str = 'context',
) -> Float[Array, 'B T N H']:
    """Computes attention of this device's queries to all devices' keys along a mesh axis.

    Call it inside `shard_map`, on this device's share of every row: T and S are its lengths.
    Arguments and result are those of `kernels.attention.attention`, but positions alone give the
    order of tokens: a row may be cut and arranged in any way.

    Args:
      kernel: attends to one device's keys.
      axis: the mesh axis that rows are split over.
    """
    bits = jax.lax.bitcast_convert_type(tokens.positions_of_keys, jnp.int32)
    own = Keys(k, v, jnp.stack([bits, tokens.ids_of_keys]))
    queries = Tokens(tokens.positions, tokens.ids_of_queries)
    setting = setting._replace(query_scale=jnp.asarray(setting.query_scale, jnp.float32))
    return _ring(kernel, axis, q, own, queries, setting)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    kernel: Blockwise, axis: str, q: Array, own: Keys, queries: Tokens, setting: Setting
) -> Array:
    return _forward(kernel, axis, q, own, queries, setting)[0]


def _forward(
    kernel: Blockwise, axis: str, q: Array, own: Keys, queries: Tokens, setting: Setting
) -> tuple[Array, tuple[Any, ...]]:
    def attend(keys: Keys) -> tuple[Array, ...]:
        out, lse = kernel.forward(q, keys.k, keys.v, *_seen(queries, keys, setting))
        return _heads_first(out), lse

    keys, (out, lse) = _send_while(own, axis, attend, own)
    for steps_left in reversed(range(jax.lax.axis_size(axis) - 1)):
        sent = keys if steps_left else None
        arrived, here = _send_while(sent, axis, attend, keys)
        # Merged before the next step begins: else all steps' results might wait for the end.
        keys, out, lse = jax.lax.optimization_barrier((arrived, *merge(out, lse, *here)))
    out = checkpoint_name(_tokens_first(out).astype(q.dtype), 'attention_output')
    lse = checkpoint_name(lse, 'log_sum_exp')
    return out, (q, own, queries, setting, out, lse)


def _backward(
    kernel: Blockwise, axis: str, residuals: tuple[Any, ...], cotangent: Array
) -> tuple[Array, Keys, None, None]:
    q, own, queries, setting, out, lse = residuals

    def differentiate(keys: Keys) -> tuple[Array, ...]:
        seen = _seen(queries, keys, setting)
        dq, dk, dv = kernel.backward(q, keys.k, keys.v, out, lse, cotangent, *seen)
        return _heads_first(dq), dk, dv

    def add(x: Array, y: Array) -> Array:
        return x.astype(lse.dtype) + y.astype(lse.dtype)

    keys, (dq, *sums) = _send_while(own, axis, differentiate, own)
    for steps_left in reversed(range(jax.lax.axis_size(axis) - 1)):
        sent = keys if steps_left else None
        (arrived, sums), here = _send_while((sent, sums), axis, differentiate, keys)
        totals = [add(x, y) for x, y in zip((dq, *sums), here, strict=True)]
        keys, dq, *sums = jax.lax.optimization_barrier((arrived, *totals))
    dk, dv = _send([x.astype(q.dtype) for x in sums], axis)
    return _tokens_first(dq).astype(q.dtype), Keys(dk, dv, None), None, None


_ring.defvjp(_forward, _backward)


def _seen(queries: Tokens, keys: Keys, setting: Setting) -> tuple[Tokens, Setting]:
    """Makes a kernel's arguments for one device's queries and another's keys."""
    bits, segment_ids = keys.tokens
    positions = jax.lax.bitcast_convert_type(bits, queries.positions.dtype)
    tokens = queries._replace(key_positions=positions, key_segment_ids=segment_ids)
    # jax.checkpoint keeps a constant as one of its own, which is no Array.
    return tokens, setting._replace(query_scale=jnp.asarray(setting.query_scale))


def _send(x: Any, axis: str) -> Any:
    """Sends a tree of arrays to the next device of the ring; returns what the one before sent."""
    size = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, to_next), x)


def _send_while(
    x: Any, axis: str, compute: Callable[[Keys], tuple[Array, ...]], keys: Keys
) -> tuple[Any, tuple[Array, ...]]:
    """Runs `_send(x)` beside `compute(keys)`: neither result can be used before both are there.

    XLA does not know how long a kernel takes, and would send during the operations after it.
    """
    return jax.lax.optimization_barrier((_send(x, axis), compute(keys)))


def _heads_first(x: Float[Array, 'B T N H']) -> Float[Array, 'B N T H']:
    """Lays out x as the TPU kernels write it, or XLA would copy to another layout and back."""
    return with_layout_constraint(x.swapaxes(1, 2), Layout((0, 1, 2, 3)))


def _tokens_first(x: Float[Array, 'B N T H']) -> Float[Array, 'B T N H']:
    return x.swapaxes(1, 2)


def merge(
    out: Float[Array, 'B N T H'],
    lse: Float[Array, 'B N T'],
    more_out: Float[Array, 'B N T H'],
    more_lse: Float[Array, 'B N T'],
) -> tuple[Float[Array, 'B N T H'], Float[Array, 'B N T']]:
    """Merges attention to two sets of keys, and the log-sum-exps, in the dtype of `lse`."""
    total = jnp.logaddexp(lse, more_lse)

    def share(one: Array) -> Array:
        # A query that saw nothing has −∞ in both, and −∞ − −∞ is NaN.
        return jnp.exp(one - jnp.where(jnp.isfinite(total), total, 0))[..., None]

    return out * share(lse) + more_out * share(more_lse), total


def zigzag_rows(rows: PyTree) -> PyTree:
    """Applies `zigzag` to every array [B T …] of a tree, for the mesh that is set, not to others.

    Raises:
      ValueError: twice the context axis does not divide T.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape['context'] == 1:
        return rows

    def arrange(x: Array) -> Array:
        if x.ndim < 2:
            return x
        axes = ('batch', 'length', *['whole'] * (x.ndim - 2))
        return constrain(zigzag(x, mesh.shape['context']), *axes)

    return jax.tree.map(arrange, rows)


def zigzag(x: Shaped[Array, '...'], num_shards: int, axis: int = 1) -> Shaped[Array, '...']:
    """Reorders an axis so that shard i of `num_shards` = C holds the pieces i and 2C−1−i of 2C.

    Raises:
      ValueError: 2C does not divide the axis.
    """
    if x.shape[axis] % (2 * num_shards):
        raise ValueError(
            f'x {x.shape}: axis {axis} must be a multiple of {2 * num_shards}, twice the '
            f'{num_shards} devices that share a row.'
        )
    halves = jnp.moveaxis(x, axis, 0)
    halves = halves.reshape(2, num_shards, -1, *halves.shape[1:])
    pairs = jnp.stack([halves[0], halves[1, ::-1]], axis=1)
    return jnp.moveaxis(pairs.reshape(-1, *pairs.shape[3:]), 0, axis)
