"""The gated mix with its norm: each kernel against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted
from jax.experimental.pallas import tpu as pltpu

from helios_jax.kernels import gated_norm
from helios_jax.verify.gated_norm import MOST, cases, compare, draw, ratio

pytestmark = pytest.mark.usefixtures('quick_compilation')

# Rows that fill no program and no block; widths that are no powers of two.
QUICK = ('convex', 'convex, layer end', 'layerscale')
CASES = [
    pytest.param(name, case, marks=() if case.name in QUICK else pytest.mark.slow)
    for name, every in (
        ('gpu', cases(81, (320, 64), rank=24)),
        ('tpu', cases(96, (384, 128), rank=24)),
    )
    for case in every
    if name == 'gpu' or case.rank >= 0
]


@pytest.mark.parametrize(('name', 'case'), CASES, ids=lambda value: getattr(value, 'name', value))
def test_no_block_of_rows_errs_by_twice_a_rounding(name, case):
    kernel = interpreted(name)
    assert not kernel.refusal(draw(case)[0], case.tokens)
    forward, backward = (jax.jit(f, static_argnums=0) for f in (kernel.forward, kernel.backward))
    worst = compare(case, forward, backward)
    assert max(worst.values()) <= MOST, worst


def test_a_wrong_row_is_seen():
    exact = np.random.default_rng(0).normal(size=(64, 8))
    wrong = exact.copy()
    wrong[40] *= 1.05
    assert ratio(np.float64(jnp.bfloat16(exact)), exact) == 1
    assert ratio(wrong, exact) > MOST
    assert ratio(exact, np.float64(jnp.bfloat16(exact))) == np.inf  # where no rounding errs


@pytest.mark.parametrize(
    ('name', 'changes', 'reason'),
    [
        ('gpu', {'x': jnp.zeros((32, 320))}, '32 tokens of 320 values in float32'),
        ('gpu', {'x': jnp.zeros((32, 72), jnp.bfloat16)}, 'multiples of 64 up to 8192, not 72'),
        ('gpu', {'x': jnp.zeros((32, 8256), jnp.bfloat16)}, 'not 8256'),
        ('tpu', {'x': jnp.zeros((32, 256))}, 'bfloat16'),
        ('tpu', {'x': jnp.zeros((32, 320), jnp.bfloat16)}, 'multiples of 128'),
        ('tpu', {'x': jnp.zeros((40, 256), jnp.bfloat16)}, 'divide 40 tokens'),
        ('tpu', {'out': None}, 'logits'),
        ('tpu', {'out': jnp.zeros((2**14, 256), jnp.bfloat16)}, "gate's matrix"),
    ],
)
def test_what_a_kernel_cannot_take_is_left_to_xla(name, changes, reason, caplog, monkeypatch):
    case = next(cases(32, (256,), rank=16))
    monkeypatch.setitem(gated_norm.KERNELS, 'cpu', interpreted(name))
    gated_norm.log_refusal.cache_clear()
    with caplog.at_level('INFO'):
        assert not gated_norm.takes(draw(case)[0]._replace(**changes))
    assert reason in caplog.text


@pytest.mark.slow
def test_blocks_do_not_race():
    """Each core adds up gradients of its own, while blocks come and go."""
    case = next(cases(128, (256,), rank=16))
    kernel = interpreted('tpu', pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    worst = compare(case, kernel.forward, kernel.backward)
    assert max(worst.values()) <= MOST, worst
