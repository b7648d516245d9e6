"""Times a mixture of experts, router to combination, beside a dense sublayer of equal active FLOPs.

    helios bench moe --target=gpu --what=sublayer

Both are the model's modules, forward and backward, and keep what the policy `minimal` keeps. Their
weights are bfloat16. The router is as initialised: loads are what its scores give. FLOPs are those
of the experts' products alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from helios_jax import config, options
from helios_jax.bench.timed import take_turns, timed
from helios_jax.memory.policy import PRESETS
from helios_jax.model.moe import MixtureOfExperts, SwiGLU

GIB = 2**30
TOKENS = 16_384


class Sublayer(NamedTuple):
    """A compiled gradient, with arguments to run it on."""

    compiled: Any
    arguments: tuple[Any, ...]

    @property
    def temp_gib(self) -> float:
        return self.compiled.memory_analysis().temp_size_in_bytes / GIB


def measure(name: str, num_rows: int, E: int, D: int, F: int) -> None:
    """Prints a row: TFLOP/s of both, their ratio, and what the gradients need beside arguments.

    Args:
      num_rows: tokens, times the experts that each visits.
    """
    num_chosen = num_rows // TOKENS
    moe = config.MoE(num_experts=E, num_experts_per_token=num_chosen, mlp_dim=F)
    model = config.Model(embed_dim=D, period='moe', moe=moe)
    both = {
        'experts': gradient(MixtureOfExperts(model), D, lambda out: out[0], None),
        'dense': gradient(SwiGLU(model, num_chosen * F), D, lambda out: out),
    }
    seconds = take_turns({form: timed(*one) for form, one in both.items()})
    flops = 18 * num_rows * D * F
    rates = {form: round(flops / time / 1e12, 1) for form, time in seconds.items()}
    row: dict[str, Any] = {'shape': name, 'what': 'sublayer', 'tflops': rates}
    row |= {'ratio': round(seconds['dense'] / seconds['experts'], 3)}
    row |= {'temp_gib': {form: round(one.temp_gib, 3) for form, one in both.items()}}
    row |= {'permuted_rows_gib': round(2 * num_rows * D / GIB, 3)}
    print(options.to_json(row), flush=True)


def gradient(module: Any, D: int, result: Callable[[Any], jax.Array], *rest: Any) -> Sublayer:
    """Compiles output and gradients of a module; draws its weights and its input."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key: jax.random.normal(key, (4, TOKENS // 4, D), jnp.bfloat16)
    x, d_out = draw(keys[0]), draw(keys[1])
    variables = jax.jit(module.init)(keys[2], x[:1, :8], *rest)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    names = {*PRESETS['minimal'], 'router_choices'}
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    @functools.partial(jax.checkpoint, policy=policy)
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return result(module.apply({**variables, 'params': params}, x, *rest))

    def step(params: Any, x: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(apply, params, x)
        return out, pull(d_out)

    arguments = variables['params'], x, d_out
    return Sublayer(jax.jit(step).lower(*arguments).compile(), arguments)
