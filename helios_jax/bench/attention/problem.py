"""The attention layer whose time the bench predicts, built as the model builds it.

x [B T D] → q, k, v → rotation and attention → output projection, forward with what backward needs,
and backward from that. Between the projections stands an implementation, or a kernel that does
nothing, which takes and returns the heads in the layout that suits the matmuls. The time that a
layer takes beyond the one that does nothing is attention's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from helios_jax.errors import require
from helios_jax.plan.compiler.timing import Visits

PASSES = ('forward', 'backward')
ROPE_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """A shape of attention: bfloat16, causal, H/2 rotation frequencies, D = N·H."""

    length: int  # T
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    documents: int = 1  # documents in a row, of random lengths
    window: int = 0

    def __post_init__(self) -> None:
        require(
            self.kv_heads > 0 and self.heads % self.kv_heads == 0,
            f'--kv_heads={self.kv_heads} must divide --heads={self.heads}.',
        )
        require(
            0 < self.documents <= self.length,
            f'--documents={self.documents} must be from 1 to the length, {self.length}.',
        )

    @functools.cached_property
    def segment_ids(self) -> np.ndarray:
        """Numbers each token's document from 1, [B T]; there is no padding."""
        rng = np.random.default_rng(0)
        rows = np.ones((self.batch, self.length), np.int32)
        for row in rows:
            ends = rng.choice(np.arange(1, self.length), self.documents - 1, replace=False)
            row += np.searchsorted(np.sort(ends), np.arange(self.length), side='right')
        return rows

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """Counts each token's place in its document from 0, [B T]."""
        before = np.pad(self.segment_ids[:, :-1], ((0, 0), (1, 0)))
        at = np.arange(self.length, dtype=np.int32)
        starts = np.where(self.segment_ids != before, at, 0)
        return at - np.maximum.accumulate(starts, axis=1)

    def flops(self, which: str) -> float:
        """Counts FLOPs of the products that the mask leaves: two in forward, five in backward."""
        seen = self.positions + 1
        if self.window:
            seen = np.minimum(seen, self.window)
        products = {'forward': 2, 'backward': 5}[which]
        return 2.0 * products * self.heads * self.head_dim * int(seen.sum())


class Candidate(NamedTuple):
    """An implementation with one set of its options, ready for a problem."""

    # q [B N T H], k and v [B K T H] where `heads` is 'bnth', [B T N H] and [B T K H] where it is
    # 'btnh'; positions and segment ids [B T] → an array like q. It rotates q and k itself.
    attend: Callable[[Array, Array, Array, Array, Array], Array]
    heads: str
    # What each of its kernels does; the key is found in the kernel's name.
    visits: dict[str, Visits]


def frequencies(problem: Problem) -> np.ndarray:
    """Computes the rotation's radians per position, float32 [H/2]."""
    half = problem.head_dim // 2
    return (ROPE_BASE ** (-np.arange(half) / half)).astype(np.float32)


def layer(
    candidate: Candidate,
    weights: dict[str, Array],
    x: Float[Array, 'B T D'],
    positions: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'],
) -> Float[Array, 'B T D']:
    """Runs the projections with the candidate between them."""
    q, k, v = (jnp.einsum(f'btd,dnh->{candidate.heads}', x, weights[name]) for name in 'qkv')
    out = candidate.attend(q, k, v, positions, segment_ids)
    return jnp.einsum(f'{candidate.heads},nhd->btd', out, weights['out'])


def program(
    problem: Problem, candidate: Candidate, which: str, *, alone: bool = False
) -> tuple[Callable[..., Any], tuple]:
    """Returns the function of a pass, to compile, and the shapes of its arguments.

    'forward' returns the layer's output and what backward needs; 'backward' takes that and the
    output's cotangent, and returns the gradients of weights and x.

    Args:
      which: forward | backward.
      alone: leave out the projections; the arguments are q, k and v.
    """
    B, T, D = problem.batch, problem.length, problem.heads * problem.head_dim
    N, K, H = problem.heads, problem.kv_heads, problem.head_dim
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    if alone:
        sizes = {'b': B, 't': T, 'h': H}
        inputs: tuple[Any, ...] = tuple(
            shape([(sizes | {'n': heads})[axis] for axis in candidate.heads]) for heads in (N, K, K)
        )
        run: Callable[..., Array] = candidate.attend
    else:
        weights = {'q': shape((D, N, H)), 'k': shape((D, K, H)), 'v': shape((D, K, H))}
        inputs = (weights | {'out': shape((N, H, D))}, shape((B, T, D)))
        run = functools.partial(layer, candidate)

    def forward(inputs: Any, positions: Array, segment_ids: Array) -> Any:
        return jax.vjp(lambda *inputs: run(*inputs, positions, segment_ids), *inputs)

    arguments = (inputs, tokens, tokens)
    if which == 'forward':
        return forward, arguments
    out, pullback = jax.eval_shape(forward, *arguments)
    return lambda pullback, cotangent: pullback(cotangent), (pullback, out)


def nothing() -> Candidate:
    """Makes attention that does nothing, with the arguments and results of one that does."""

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array) -> Array:
        return untouched('nothing_forward', [q], q, k, v)[0]

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
        out = attend(q, k, v)
        return out, (q, k, v, out)

    def backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        return untouched('nothing_backward', residuals[:3], *residuals, cotangent)

    attend.defvjp(forward, backward)
    return Candidate(lambda q, k, v, positions, segment_ids: attend(q, k, v), 'bnth', {})


def untouched(name: str, like: Any, *inputs: Array) -> tuple[Array, ...]:
    """Returns a kernel's results, which it never writes."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda *_: None,
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
        in_specs=[anywhere] * len(inputs),
        out_specs=(anywhere,) * len(like),
        name=name,
    )(*inputs)
