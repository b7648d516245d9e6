"""`helios bench gates`: what it times is what the kernel computes, and only where there is one."""

import jax
import numpy as np
import pytest
from interpreted import interpreted
from refusals import refused

from helios_jax.bench import gates
from helios_jax.kernels import gated_norm
from helios_jax.kernels.gated_norm import Mix


@pytest.mark.slow
def test_xlas_form_is_the_kernels(monkeypatch):
    monkeypatch.setattr(gates, 'VALUES', 48 * 128)
    monkeypatch.setitem(gated_norm.KERNELS, 'cpu', interpreted('gpu'))
    given, gradients = gates.draw(128)
    ours = lambda given: gated_norm.gated_norm(Mix(True, True, gates.EPS), 'cpu', given)
    forms = [gates.runs(form, given, gradients) for form in (ours, gates.by_xla)]
    for direction in ('forward', 'gradient'):
        results = []
        for form in forms:
            form[direction].start()
            results.append(jax.tree.leaves(form[direction].finish()))
        for one, other in zip(*results, strict=True):
            one, other = np.float64(one), np.float64(other)
            assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(other)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ((), 'measures on an NVIDIA GPU, and this is a cpu'),
        (('--verify',), '--verify: there is no kernel for cpu'),
        (('--widths=x',), '--widths=x: not a number'),
    ],
)
def test_where_there_is_no_kernel_it_says_so(flags, message, capsys):
    assert message in refused(capsys, 'bench', 'gates', *flags)
