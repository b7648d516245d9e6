"""Compares the grouped products of a Hopper GPU with float64.

    helios bench moe --target=gpu --verify

Each expert's results are compared alone: error over that of the exact product, rounded. Rows of no
group hold NaN; so do, in a second run, the rows of the fullest expert.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import options
from helios_jax.arch.grouped_matmul import ROWS
from helios_jax.errors import require
from helios_jax.kernels.grouped_matmul import hopper


def patterns(E: int, M: int) -> dict[str, np.ndarray]:
    """Group sizes that are hard in some way."""
    draw = np.random.default_rng(E)
    random = lambda rows, spread: draw.multinomial(rows, draw.dirichlet(np.full(E, spread)))
    e = np.arange(E)
    return {
        'random': random(M, 2.0),
        'rows of no group': random(M * 2 // 3, 0.4),
        'all rows to one': np.where(e == E // 2, M, 0),
        'every offset modulo 16': np.full(E, min(17, M // E)),
        'one row each': np.where(e == E - 1, min(300, M - E + 1), 1),
        'every other empty': np.where(e % 2, M // E, 0),
        'no rows': np.zeros(E, int),
        'first and last': np.where(e == 0, min(M, 129), 0)
        + np.where(e == E - 1, (M - min(M, 129)) // 2, 0),
    }


def verify(E: int, M: int, D: int, F: int) -> None:
    """Compares the three products by the worst expert, and prints a row.

    Raises:
      AssertionError: an error above twice a rounded product's, or what should be zero is not.
    """
    draw = np.random.default_rng(E)
    normal = lambda *size: jnp.asarray(draw.standard_normal(size, np.float32), jnp.bfloat16)
    x, w, d = normal(M, D), normal(E, D, F), normal(M, F)
    x64, w64, d64 = (np.asarray(each, np.float64) for each in (x, w, d))
    forward, weights = jax.jit(hopper.multiply), jax.jit(hopper.weight_gradient)
    backward = jax.jit(functools.partial(hopper.multiply, transposed=True))
    norm = np.linalg.norm
    worst = {'multiply': 0.0, 'transposed': 0.0, 'gradient': 0.0}
    for name, sizes in patterns(E, M).items():
        ends = np.cumsum(sizes)
        hurts = [None, int(np.argmax(sizes))] if E > 1 and sizes.any() else [None]
        exact = [
            (x64[a:b] @ w64[e], d64[a:b] @ w64[e].T, x64[a:b].T @ d64[a:b])
            for e, (a, b) in enumerate(zip(ends - sizes, ends, strict=True))
        ]
        for hurt in hurts:
            nan = (np.arange(M) >= ends[-1])[:, None]
            if hurt is not None:
                nan[ends[hurt] - sizes[hurt] : ends[hurt]] = True
            rows, gradient = (jnp.where(nan, jnp.nan, each) for each in (x, d))
            groups = jnp.asarray(sizes, jnp.int32)
            out = forward(rows, w, groups), backward(gradient, w, groups)
            out_rows = [np.asarray(each, np.float64) for each in out]
            out_weights = np.asarray(weights(rows, gradient, groups), np.float64)
            assert not any(each[ends[-1] :].any() for each in out_rows), f'{name}: rows of no group'
            for e in set(range(E)) - {hurt}:
                own = slice(ends[e] - sizes[e], ends[e])
                found = (*(each[own] for each in out_rows), out_weights[e])
                for product, one, best in zip(worst, found, exact[e], strict=True):
                    plain = norm(np.asarray(jnp.asarray(best, jnp.bfloat16), np.float64) - best)
                    error = norm(one - best)
                    ratio = error / plain if plain else (np.inf if error else 0)
                    assert ratio <= 2, f'{product}, {name}, expert {e} of {E}: {ratio}'
                    worst[product] = max(worst[product], float(ratio))
    print(options.to_json({'E': E, 'M': M, 'D': D, 'F': F, 'worst': worst}), flush=True)


def verify_all() -> None:
    """Runs `verify` for few and many experts, and rows that fill no tile.

    Raises:
      UserError: no Hopper GPU.
    """
    require_hopper()
    for E in (1, 2, 5, 8, 56, 128):
        verify(E, M=1111, D=384, F=512)
    verify(3, M=77, D=256, F=384)


def require_hopper() -> None:
    """Raises UserError if the first device is no GPU that the kernels run on."""
    device = jax.devices()[0]
    found = getattr(device, 'compute_capability', '')
    require(
        device.platform == 'gpu' and found == ROWS['hopper'].capability,
        f'--target=gpu: the kernels need a Hopper GPU, and here is {device.device_kind}.',
    )
