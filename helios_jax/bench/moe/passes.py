"""Times passes over memory around an expert's products beside XLA's, on a GPU.

    helios bench moe --target=gpu --what=passes

Prints rows of the copies of tokens in experts' order, and of SwiGLU's gradient: TB/s of the bytes
that must be read and written once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from helios_jax import options
from helios_jax.bench.moe.sublayer import TOKENS
from helios_jax.bench.timed import take_turns, timed
from helios_jax.kernels import permutation, swiglu


def measure(name: str, num_rows: int, D: int, F: int) -> None:
    """Prints a row for each pass.

    Args:
      num_rows: tokens, times the experts that each visits.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
    x, index = draw(keys[0], TOKENS, D), jax.random.randint(keys[1], (num_rows,), 0, TOKENS)
    gate_up, d_product = draw(keys[2], num_rows, 2 * F), draw(keys[3], num_rows, F)
    weight = jax.random.uniform(keys[4], (num_rows,))
    elsewhere = 'cpu'  # where no kernel is taken
    passes: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...], int]] = {
        'take': (permutation.take, (x, index), 2 * num_rows * D * 2),
        'swiglu': (swiglu.gradient, (gate_up, weight, d_product), num_rows * F * 6 * 2),
    }
    for what, (function, arguments, moved) in passes.items():
        forms = {
            'ours': jax.jit(function),
            'xla': jax.jit(lambda *given, f=function: f(*given, platform=elsewhere)),
        }
        seconds = take_turns({key: timed(form, arguments) for key, form in forms.items()})
        rates = {key: round(moved / time / 1e12, 2) for key, time in seconds.items()}
        row: dict[str, Any] = {'shape': name, 'what': what, 'terabytes_per_second': rates}
        row |= {'ratio': round(seconds['xla'] / seconds['ours'], 3)}
        print(options.to_json(row), flush=True)
