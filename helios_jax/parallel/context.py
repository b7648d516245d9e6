"""Attention over a sequence split across devices: keys travel round a ring of them.

Each device keeps its queries. One block of keys after another arrives, is attended to by the same
kernel as on one device, and is sent on while that kernel runs. What the blocks give is merged by
their log-sum-exp. In the backward pass the gradients of a block of keys travel with it, and come
home with the last step.

A causal row cut into C consecutive parts would leave the first device idle. `zigzag` gives device i
the parts i and 2C−1−i of 2C instead: of a block from a device before it all its queries see the
first half, of a block from a device after it the second half of its queries sees all. So every
device has the same work at every step, where the kernel skips what nobody sees. Positions and
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
from jaxtyping import Array, Float, Int, Num, PyTree, Shaped

from helios_jax.parallel.sharding import constrain


class Kernel(NamedTuple):
    """Attention on one device: the two functions of `kernels.attention.reference`."""

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


class Block(NamedTuple):
    """What travels: few arrays, for XLA has at most five on their way at once."""

    k: Float[Array, 'B S K H']
    v: Float[Array, 'B S K H']
    tokens: Int[Array, '2 B S']  # the bits of the positions, and the segment ids


def ring_attention(
    kernel: Kernel,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K H'],
    *,
    positions: Num[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    key_positions: Num[Array, 'B S'] | None = None,
    key_segment_ids: Int[Array, 'B S'] | None = None,
    frequencies: Float[Array, 'R'],
    query_scale: float | Float[Array, ''] = 1.0,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    axis: str = 'context',
) -> Float[Array, 'B T N H']:
    """Attention of this device's queries to the keys of all devices along a mesh axis.

    To be called inside `shard_map`, on this device's part of every row: T and S are its lengths.
    Arguments and result are those of `kernels.attention.attention`, but that positions alone say
    what comes before what: a row may be cut and arranged anyhow.

    Args:
      kernel: attends to one device's keys.
      key_positions: None: the keys are the queries' own tokens.
      key_segment_ids: None: `segment_ids`.
      axis: the mesh axis that rows are split over.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(positions.shape, jnp.int32)
    if key_positions is None:
        key_positions = positions
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    options = {'scale': scale, 'window': window, 'softcap': softcap}
    rows = {
        'positions': positions,
        'segment_ids': segment_ids,
        'frequencies': frequencies,
        'query_scale': jnp.asarray(query_scale, jnp.float32),
    }
    bits = jax.lax.bitcast_convert_type(key_positions, jnp.int32)
    tokens = jnp.stack([bits, key_segment_ids])
    kernel = Kernel(partial(kernel.forward, **options), partial(kernel.backward, **options))
    return _ring(kernel, axis, q, k, v, tokens, rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    kernel: Kernel, axis: str, q: Array, k: Array, v: Array, tokens: Array, rows: dict[str, Array]
) -> Array:
    return _forward(kernel, axis, q, k, v, tokens, rows)[0]


def _forward(
    kernel: Kernel, axis: str, q: Array, k: Array, v: Array, tokens: Array, rows: dict[str, Array]
) -> tuple[Array, tuple[Any, ...]]:
    def attend(block: Block) -> tuple[Array, ...]:
        out, lse = kernel.forward(q, block.k, block.v, **_arguments(rows, block))
        return _heads_first(out), lse

    own = Block(k, v, tokens)
    block, (out, lse) = _send_while(own, axis, attend, own)
    for steps_left in reversed(range(jax.lax.axis_size(axis) - 1)):
        sent = block if steps_left else None
        arrived, here = _send_while(sent, axis, attend, block)
        # Merged before the next step begins: else all steps' results might wait for the end.
        block, out, lse = jax.lax.optimization_barrier((arrived, *merge(out, lse, *here)))
    out = checkpoint_name(_tokens_first(out).astype(q.dtype), 'attention_output')
    lse = checkpoint_name(lse, 'log_sum_exp')
    return out, (q, own, rows, out, lse)


def _backward(
    kernel: Kernel, axis: str, residuals: tuple[Any, ...], cotangent: Array
) -> tuple[Array, Array, Array, None, None]:
    q, own, rows, out, lse = residuals

    def differentiate(block: Block) -> tuple[Array, ...]:
        arguments = _arguments(rows, block)
        dq, dk, dv = kernel.backward(q, block.k, block.v, out, lse, cotangent, **arguments)
        return _heads_first(dq), dk, dv

    def add(x: Array, y: Array) -> Array:
        return x.astype(lse.dtype) + y.astype(lse.dtype)

    block, (dq, *sums) = _send_while(own, axis, differentiate, own)
    for steps_left in reversed(range(jax.lax.axis_size(axis) - 1)):
        sent = block if steps_left else None
        (arrived, sums), here = _send_while((sent, sums), axis, differentiate, block)
        totals = [add(x, y) for x, y in zip((dq, *sums), here, strict=True)]
        block, dq, *sums = jax.lax.optimization_barrier((arrived, *totals))
    dk, dv = _send([x.astype(q.dtype) for x in sums], axis)
    return _tokens_first(dq).astype(q.dtype), dk, dv, None, None


_ring.defvjp(_forward, _backward)


def _arguments(rows: dict[str, Array], block: Block) -> dict[str, Array]:
    bits, segment_ids = block.tokens
    return {
        **rows,
        # jax.checkpoint keeps a constant as one of its own, which is no Array.
        'query_scale': jnp.asarray(rows['query_scale']),
        'key_positions': jax.lax.bitcast_convert_type(bits, rows['positions'].dtype),
        'key_segment_ids': segment_ids,
    }


def _send(x: Any, axis: str) -> Any:
    """Each array of a tree to the next device of the ring; returns what the one before sent."""
    size = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, to_next), x)


def _send_while(
    x: Any, axis: str, compute: Callable[[Block], tuple[Array, ...]], block: Block
) -> tuple[Any, tuple[Array, ...]]:
    """`_send(x)` and `compute(block)`, neither to be used before both are there.

    XLA, which does not know how long a kernel takes, would else send during what follows it.
    """
    return jax.lax.optimization_barrier((_send(x, axis), compute(block)))


def _heads_first(x: Float[Array, 'B T N H']) -> Float[Array, 'B N T H']:
    """As the TPU kernels write it, in memory too: XLA would copy to another layout and back."""
    return with_layout_constraint(x.swapaxes(1, 2), Layout((0, 1, 2, 3)))


def _tokens_first(x: Float[Array, 'B N T H']) -> Float[Array, 'B T N H']:
    return x.swapaxes(1, 2)


def merge(
    out: Float[Array, 'B N T H'],
    lse: Float[Array, 'B N T'],
    more_out: Float[Array, 'B N T H'],
    more_lse: Float[Array, 'B N T'],
) -> tuple[Float[Array, 'B N T H'], Float[Array, 'B N T']]:
    """Attention to the keys of both parts, and its log-sum-exp, in the dtype of `lse`."""
    total = jnp.logaddexp(lse, more_lse)

    def share(part: Array) -> Array:
        # A query that saw nothing has −∞ in both parts, and −∞ − −∞ is NaN.
        return jnp.exp(part - jnp.where(jnp.isfinite(total), total, 0))[..., None]

    return out * share(lse) + more_out * share(more_lse), total


def zigzag_rows(rows: PyTree) -> PyTree:
    """`zigzag` of every array [B T …] of a tree, for the mesh that is set; others pass unchanged.

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
    """Reorders an axis so that shard i of `num_shards` = C holds the parts i and 2C−1−i of 2C.

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


def unzigzag(x: Shaped[Array, '...'], num_shards: int, axis: int = 1) -> Shaped[Array, '...']:
    """The inverse of `zigzag`."""
    pairs = jnp.moveaxis(x, axis, 0)
    pairs = pairs.reshape(num_shards, 2, -1, *pairs.shape[1:])
    halves = jnp.stack([pairs[:, 0], pairs[::-1, 1]])
    return jnp.moveaxis(halves.reshape(-1, *halves.shape[3:]), 0, axis)
