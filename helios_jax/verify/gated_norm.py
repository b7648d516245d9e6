"""The gated mix and the norm behind it in NumPy: the oracle in float64, and cases for kernels.

    helios bench gates --verify

The gradients are written out by hand. A result is judged by its worst block of rows: its error over
that of the exact result, rounded once to bfloat16.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import options
from helios_jax.errors import require
from helios_jax.kernels import gated_norm
from helios_jax.kernels.gated_norm import Mix, MixOperands

ROWS = 16  # of a block
MOST = 2.0  # error over that of one rounding
WIDTHS = 320, 64, 2048, 4096, 5120
EPS, NEXT_EPS = 1e-3, 3e-3  # large, so that a norm without it would show


class MixCase(NamedTuple):
    name: str
    mix: Mix
    tokens: int
    width: int
    rank: int  # 0: the gate has no hidden vector; −1: its logits are given
    norms: str  # 'both', or those that there are: 'output', 'next', ''


def cases(tokens: int, widths: tuple[int, ...], rank: int) -> Iterator[MixCase]:
    """Yields every form at the first width, and the default one at the others."""
    convex, additive = Mix(True, True, EPS), Mix(False, True, EPS)
    plain, scaled = Mix(False, False, EPS), Mix(False, False, EPS)
    forms = [
        ('convex', convex, rank, 'both'), ('convex, layer end', convex, rank, 'output'),
        ('highway', convex, rank, 'next'), ('convex, full', convex, -1, 'both'),
        ('convex, static', convex, 0, 'both'), ('additive', additive, rank, 'next'),
        ('additive, û, layer end', additive, rank, 'output'), ('layerscale', scaled, 0, 'next'),
    ]  # fmt: skip
    for name, mix, own, norms in forms:
        yield MixCase(name, mix, tokens, widths[0], own, norms)
    for width in widths[1:]:
        yield MixCase('convex', convex, tokens, width, max(16, width // 64), 'both')
    yield MixCase('residual', plain, tokens, widths[0], 0, 'next')


def draw(case: MixCase) -> tuple[MixOperands, jax.Array, jax.Array | None]:
    """Draws a case's operands, and the gradients of its results."""
    rng = np.random.default_rng(case.width + case.rank)
    N, D = case.tokens, case.width
    narrow = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    near = lambda mean, spread: jnp.asarray(rng.normal(mean, spread, D), jnp.float32)
    given = MixOperands(narrow(N, D), narrow(N, D) * 3)
    if case.rank > 0:
        out = narrow(case.rank, D) * jnp.bfloat16(case.rank**-0.5)
        given = given._replace(hidden=narrow(N, case.rank), out=out)
    elif case.rank < 0:
        given = given._replace(hidden=narrow(N, D))
    if case.name != 'residual':
        given = given._replace(vector=near(-1, 1))
    if case.norms in ('both', 'output'):
        given = given._replace(scale=near(1, 0.3))
    d_normalized = None
    if case.norms in ('both', 'next'):
        given = given._replace(next_scale=near(1, 0.3), next_eps=jnp.float32(NEXT_EPS))
        d_normalized = narrow(N, D)
    return given, narrow(N, D), d_normalized


def oracle(mix: Mix, given: MixOperands, d_stream: Any, d_normalized: Any) -> dict[str, np.ndarray]:
    """Computes results and gradients in float64; those of operands are called d_…."""
    wide = lambda array: np.asarray(array, np.float64)
    own = {name: wide(array) for name, array in given.arrays().items()}
    x, u = own['x'], own['update']
    mean = lambda a: a.mean(-1, keepdims=True)
    factor = 1 / np.sqrt(mean(u * u) + mix.eps) if 'scale' in own else 1.0
    u_hat = u * factor * own['scale'] if 'scale' in own else u
    gate: Any = own.get('vector', 1.0)
    if mix.sigmoid:
        hidden = own.get('hidden', 0.0)
        gate = 1 / (1 + np.exp(-gate - (hidden @ own['out'] if 'out' in own else hidden)))
    other = u_hat - x if mix.interpolates else u_hat
    y = x + gate * other
    found = {'stream': y}
    d_y = wide(d_stream)
    if 'next_scale' in own:
        next_factor = 1 / np.sqrt(mean(y * y) + own['next_eps'])
        found['normalized'] = y * next_factor * own['next_scale']
        d_normal = wide(d_normalized)
        found['d_next_scale'] = (d_normal * y * next_factor).sum(0)
        weighted = d_normal * own['next_scale']
        d_y = d_y + next_factor * (weighted - y * next_factor**2 * mean(weighted * y))
    d_u_hat = d_y * gate
    found['d_x'] = d_y - d_u_hat if mix.interpolates else d_y
    d_gate = d_y * other
    if mix.sigmoid:
        d_gate = d_gate * gate * (1 - gate)
        if 'out' in own:
            found['d_hidden'], found['d_out'] = d_gate @ own['out'].T, own['hidden'].T @ d_gate
        elif 'hidden' in own:
            found['d_hidden'] = d_gate
    if 'vector' in own:
        found['d_vector'] = d_gate.sum(0)
    if 'scale' in own:
        found['d_scale'] = (d_u_hat * u * factor).sum(0)
        weighted = d_u_hat * own['scale']
        d_u_hat = factor * (weighted - u * factor**2 * mean(weighted * u))
    return found | {'d_update': d_u_hat}


def compare(
    case: MixCase, forward: Callable[..., Any], backward: Callable[..., Any]
) -> dict[str, float]:
    """Runs a kernel's two directions; returns the `ratio` of each result."""
    given, d_stream, d_normalized = draw(case)
    made = forward(case.mix, given)
    gradients = backward(case.mix, given, made.factors, d_stream, d_normalized)
    found = {'stream': made.stream, 'normalized': made.normalized}
    found |= {f'd_{name}': array for name, array in gradients._asdict().items()}
    exact = oracle(case.mix, given, d_stream, d_normalized)
    assert exact.keys() == {name for name, array in found.items() if array is not None}
    return {name: ratio(np.asarray(found[name], np.float64), best) for name, best in exact.items()}


def verify_all() -> None:
    """Runs every case on this machine's kernel, and prints a row for each.

    Raises:
      UserError: there is no kernel here.
      AssertionError: an error above twice that of one rounding.
    """
    platform = jax.default_backend()
    require(gated_norm.available(), f'--verify: there is no kernel for {platform}.')
    kernel = gated_norm.KERNELS[platform]
    forward, backward = (jax.jit(f, static_argnums=0) for f in (kernel.forward, kernel.backward))
    for case in cases(528, WIDTHS, rank=24):
        worst = compare(case, forward, backward)
        row = case._asdict() | {'mix': case.mix._asdict(), 'worst': worst}
        print(options.to_json(row), flush=True)
        assert max(worst.values()) <= MOST, (case.name, worst)


def ratio(found: np.ndarray, best: np.ndarray) -> float:
    """Error over that of the exact result rounded to bfloat16, in the worst block of rows."""
    rounded = np.asarray(jnp.asarray(best, jnp.bfloat16), np.float64)
    starts = range(0, max(len(best) - ROWS, 0) + 1, ROWS)  # the last block has what is left
    size = lambda a: np.sqrt(np.add.reduceat((a**2).sum(-1), starts))
    if best.ndim == 1:
        size = lambda a: np.sqrt((a**2).sum(keepdims=True))
    error, least = size(found - best), size(rounded - best)
    worse = np.divide(error, least, out=np.where(error > 0, np.inf, 0.0), where=least > 0)
    return float(np.max(worse))
