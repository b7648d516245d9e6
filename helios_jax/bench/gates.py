"""Times the gated mix of a sublayer's output and the norm behind it, on an NVIDIA GPU.

    helios bench gates --widths=2048,4096

Forward, from stream, output and the gate's hidden vectors to the new stream and its normalised
form; and the gradient alone, from what each form keeps for it. Ours beside the model's formulas as
XLA compiles them and the same in PyTorch with torch.compile, in turns. The floor is the time that
the card's memory takes for what must be read and written once.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch needs memory too

import jax
import jax.numpy as jnp

from helios_jax import chips, config, options
from helios_jax.bench.timed import Timed, take_turns, timed
from helios_jax.errors import require
from helios_jax.kernels import gated_norm
from helios_jax.kernels.gated_norm import Mix, MixOperands
from helios_jax.model.layers import scaled
from helios_jax.model.mixing import Gate, join

VALUES = 2**26  # of the stream
EPS = 1e-6


def draw(width: int) -> tuple[MixOperands, list[jax.Array]]:
    """Draws operands of the default gate, and the gradients of both results."""
    tokens, rank = VALUES // width, max(16, width // 64)
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(tokens, width)] * 4 + [(tokens, rank), (rank, width)]
    x, update, *gradients, hidden, out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    ones = jnp.ones(width)
    eps = jnp.float32(EPS)
    return MixOperands(x, update, hidden, out / rank, -ones, ones, ones, eps), gradients


def by_xla(given: Any) -> tuple[jax.Array, jax.Array]:
    """Computes what the kernel does, by the model's formulas."""
    batch = lambda a: a[None]
    gate = Gate(batch(given.hidden), given.out, given.vector[None, None])
    unit = config.GMU()
    y = join(unit, EPS, batch(given.x), batch(given.update), gate, given.scale)[0]
    return y, scaled(y, given.next_scale, jax.lax.stop_gradient(given.next_eps))


def runs(function: Callable[..., Any], given: MixOperands, gradients: Any) -> dict[str, Timed]:
    """Makes the runs of a form in JAX."""
    compiled = jax.jit(function)
    _, pull = jax.jit(lambda given: jax.vjp(function, given))(given)
    pulled = jax.jit(lambda pull, gradients: pull(tuple(gradients)))
    return {'forward': timed(compiled, (given,)), 'gradient': timed(pulled, (pull, gradients))}


def by_torch(given: MixOperands) -> dict[str, Timed]:
    """Makes the runs of PyTorch."""
    import torch

    def normalized(x: Any, scale: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale

    @torch.compile(dynamic=False)
    def mixed(
        x: Any, update: Any, hidden: Any, out: Any, vector: Any, scale: Any, next_scale: Any
    ) -> Any:
        gate = torch.sigmoid((hidden @ out).float() + vector)
        y = torch.lerp(x.float(), normalized(update.float(), scale), gate).bfloat16()
        return y, normalized(y.float(), next_scale).bfloat16()

    def tensor(array: Any) -> Any:
        kind = torch.bfloat16 if array.dtype == jnp.bfloat16 else torch.float32
        made = torch.randn(*array.shape, device='cuda', dtype=kind)
        return (made / len(made) if array is given.out else made).requires_grad_()

    arguments = [tensor(array) for array in given[:7]]

    def forward() -> Any:
        with torch.no_grad():
            return mixed(*arguments)

    results = mixed(*arguments)
    gradients = [torch.randn_like(result) for result in results]
    back = lambda: torch.autograd.grad(results, arguments, gradients, retain_graph=True)
    return {
        'forward': Timed(forward, torch.cuda.synchronize),
        'gradient': Timed(back, torch.cuda.synchronize),
    }


def measure(width: int) -> None:
    """Prints a row for each direction.

    Raises:
      UserError: a width that the kernel does not take.
    """
    given, gradients = draw(width)
    require(gated_norm.takes(given), f'--widths={width}: the kernel takes multiples of 64 to 8192.')
    ours = lambda given: gated_norm.gated_norm(Mix(True, True, EPS), 'gpu', given)
    forms = {'ours': runs(ours, given, gradients), 'xla': runs(by_xla, given, gradients)}
    forms['torch'] = by_torch(given)
    directions = ('forward', 'gradient')
    every = {(form, one): forms[form][one] for form in forms for one in directions}
    seconds = take_turns(every)
    chip = chips.find(jax.devices()[0].device_kind)
    for direction, passes in zip(directions, (4, 6), strict=True):
        milliseconds = {form: round(1e3 * seconds[form, direction], 3) for form in forms}
        row: dict[str, Any] = {'width': width, 'what': direction, 'milliseconds': milliseconds}
        ratios = {form: milliseconds[form] / milliseconds['ours'] for form in ('xla', 'torch')}
        row['ratios'] = {form: round(ratio, 2) for form, ratio in ratios.items()}
        if chip:
            row['floor'] = round(1e3 * passes * 2 * VALUES / chip.hbm_bytes_per_second, 3)
        print(options.to_json(row), flush=True)


def measure_all(widths: list[int]) -> None:
    """Prints the rows of each width.

    Raises:
      UserError: no NVIDIA GPU, or a width that the kernel does not take.
    """
    here = jax.default_backend()
    require(here == 'gpu', f'helios bench gates measures on an NVIDIA GPU, and this is a {here}.')
    for width in widths:
        measure(width)
