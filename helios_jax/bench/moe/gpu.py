"""Measures the grouped products on an NVIDIA GPU beside torch.nn.functional.grouped_mm.

    helios bench moe --target=gpu --shapes=e8,e128,e56 --loads=even,skew --what=layer
    helios bench moe --target=gpu --shapes=e128 --what=sublayer

A layer is forward and backward of a SwiGLU over sorted rows: out, and the gradients of rows and
weights. Ours computes gate and up as one product. Of torch's two forms, compiled, the faster is
the peer: with gate and up as one product, or as two. Windows of ours and of torch take turns, for
the card's clock follows its power and its heat. Prints a JSON row a measurement, in TFLOP/s of the
rows that there are. Needs torch with CUDA, in one process with jax.

A sublayer is all of a mixture of experts beside a dense one (sublayer.py); passes.py has what lies
between the products.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax import options
from helios_jax.bench.moe import passes, sublayer
from helios_jax.bench.moe.problem import SHAPES
from helios_jax.bench.timed import Timed, take_turns, timed
from helios_jax.errors import require
from helios_jax.kernels.grouped_matmul import hopper
from helios_jax.verify.grouped_matmul import require_hopper

LOADS = ('even', 'skew', 'hot', 'natural')
WHAT = ('sublayer', 'passes', 'layer', 'multiply', 'transposed', 'gradient')


class Layer(NamedTuple):
    """Sizes of a layer; M counts each token once an expert."""

    M: int
    E: int
    D: int
    F: int


LAYERS = {name: Layer(*sizes) for name, sizes in SHAPES.items()}


def group_sizes(shape: Layer, load: str) -> np.ndarray:
    """Draws how many rows each expert gets, int32 [E].

    'even'; 'skew': the fullest has four times the rows of the emptiest; 'hot': one has four times
    the mean; 'natural': Dirichlet, the fullest has about twice the mean.
    """
    M, E = shape.M, shape.E
    draw = np.random.default_rng(0)
    if load == 'skew':
        shares = draw.permutation(np.linspace(4, 1, E))
    elif load == 'hot':
        shares = np.where(np.arange(E) == E // 3, 4, (E - 4) / (E - 1))
    elif load == 'natural':
        shares = draw.dirichlet(np.full(E, 8.0))
    else:
        shares = np.ones(E)
    ends = np.round(np.cumsum(shares) / np.sum(shares) * M).astype(np.int32)
    return np.diff(ends, prepend=np.int32(0))


def swiglu(gate_up: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def layer(
    rows: jax.Array, weights: jax.Array, down: jax.Array, d_out: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """Computes the layer and its gradients; weights [E D 2F] are gate beside up."""
    gate_up = hopper.multiply(rows, weights, sizes)
    product, pull = jax.vjp(swiglu, gate_up)
    out = hopper.multiply(product, down, sizes)
    (d_gate_up,) = pull(hopper.multiply(d_out, down, sizes, transposed=True))
    d_down = hopper.weight_gradient(product, d_out, sizes)
    d_rows = hopper.multiply(d_gate_up, weights, sizes, transposed=True)
    return out, d_rows, hopper.weight_gradient(rows, d_gate_up, sizes), d_down


def ours(shape: Layer, what: str, loads: list[str]) -> dict[str, Timed]:
    """Makes the runs of our kernels for each load."""
    M, E, D, F = shape
    function: Callable[..., Any]
    arguments: tuple[jax.Array, ...]
    draw = jax.jit(
        lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16),
        static_argnums=1,
    )
    if what == 'layer':
        scale = lambda size: jnp.bfloat16(size**-0.5)
        weights, down = draw(0, (E, D, 2 * F)) * scale(D), draw(1, (E, F, D)) * scale(F)
        function, arguments = layer, (draw(2, (M, D)), weights, down, draw(3, (M, D)))
    elif what == 'multiply':
        function, arguments = hopper.multiply, (draw(0, (M, D)), draw(1, (E, D, F)))
    elif what == 'transposed':
        function = functools.partial(hopper.multiply, transposed=True)
        arguments = draw(0, (M, F)), draw(1, (E, D, F))
    else:
        function, arguments = hopper.weight_gradient, (draw(0, (M, D)), draw(1, (M, F)))
    compiled = jax.jit(function).lower(*arguments, jnp.zeros(E, jnp.int32)).compile()

    def run(load: str) -> Timed:
        return timed(compiled, (*arguments, jnp.asarray(group_sizes(shape, load))))

    return {load: run(load) for load in loads}


def torchs(shape: Layer, what: str, loads: list[str], *, fused: bool) -> dict[str, Timed]:
    """Makes the runs of torch's grouped_mm for each load."""
    import torch
    from torch.nn.functional import grouped_mm, silu

    M, E, D, F = shape
    draw = lambda *size: torch.randn(*size, device='cuda', dtype=torch.bfloat16)

    def layer(rows: Any, ends: Any, down: Any, *weights: Any) -> Any:
        if fused:
            gate, up = grouped_mm(rows, weights[0], offs=ends).chunk(2, dim=-1)
        else:
            gate, up = (grouped_mm(rows, each, offs=ends) for each in weights)
        return grouped_mm(silu(gate) * up, down, offs=ends)

    if what == 'layer':
        matrices = [draw(E, D, 2 * F)] if fused else [draw(E, D, F), draw(E, D, F)]
        matrices = [each * D**-0.5 for each in matrices]
        rows, d_out, down = draw(M, D), draw(M, D), draw(E, F, D) * F**-0.5
        wanted = [each.requires_grad_() for each in (rows, down, *matrices)]
        compiled = torch.compile(layer, dynamic=False)

        def function(ends: Any) -> Any:
            return torch.autograd.grad(compiled(rows, ends, down, *matrices), wanted, d_out)
    elif what == 'multiply':
        rows, weights = draw(M, D), draw(E, D, F)
        function = lambda ends: grouped_mm(rows, weights, offs=ends)
    elif what == 'transposed':
        rows, weights = draw(M, F), draw(E, D, F)
        function = lambda ends: grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
    else:
        rows, d_out = draw(M, D), draw(M, F)
        function = lambda ends: grouped_mm(rows.t(), d_out, offs=ends)

    def run(load: str) -> Timed:
        ends = np.cumsum(group_sizes(shape, load), dtype=np.int32)
        return Timed(functools.partial(function, torch.tensor(ends).cuda()), torch.cuda.synchronize)

    return {load: run(load) for load in loads}


def measure(name: str, what: str, loads: list[str]) -> None:
    """Prints a row for each load."""
    shape = LAYERS[name]
    forms = {'ours': ours(shape, what, loads)}
    forms['torch'] = torchs(shape, what, loads, fused=True)
    if what == 'layer':
        forms['torch, gate and up apart'] = torchs(shape, what, loads, fused=False)
    runs = {(load, form): forms[form][load] for load in loads for form in forms}
    seconds = take_turns(runs)
    flops = (18 if what == 'layer' else 2) * shape.M * shape.D * shape.F
    rate = lambda load, form: round(flops / seconds[load, form] / 1e12, 1)
    for load in loads:
        rates = {form: rate(load, form) for form in forms}
        peer = max(value for form, value in rates.items() if form != 'ours')
        row: dict[str, Any] = {'shape': name, 'what': what, 'load': load, 'tflops': rates}
        row |= {'ratio': round(rates['ours'] / peer, 3)}
        row |= {'of_even': round(rates['ours'] / rate(loads[0], 'ours'), 3)}
        print(options.to_json(row), flush=True)


def measure_all(shapes: list[str], loads: list[str], what: list[str]) -> None:
    """Prints a row for each.

    Raises:
      UserError: no such shape, load or thing to measure; no Hopper GPU.
    """
    for flag, given, known in (
        ('shapes', shapes, LAYERS), ('loads', loads, LOADS), ('what', what, WHAT),
    ):  # fmt: skip
        for name in given:
            require(name in known, f'--{flag}={name}: there are {", ".join(known)}.')
    require_hopper()
    for name in shapes:
        for one in what:
            if one == 'sublayer':
                sublayer.measure(name, *LAYERS[name])
            elif one == 'passes':
                passes.measure(name, LAYERS[name].M, LAYERS[name].D, LAYERS[name].F)
            else:
                measure(name, one, loads)
