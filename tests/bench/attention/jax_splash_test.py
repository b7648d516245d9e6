"""How often the regions of jax's kernels run."""

import dataclasses

import pytest
from attention_shapes import PROBLEMS, blocks, total, visible

from helios_jax.bench.attention import jax_splash
from helios_jax.bench.attention.problem import Problem


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('problem', PROBLEMS, ids=str)
def test_jax_splash_runs_each_block_below_the_diagonal(problem, fused):
    """It skips by the mask alone: segments change nothing."""
    options = {'block': 512, 'compute': 512, 'fused': fused}
    found = jax_splash.candidate(problem, options).visits
    whole = dataclasses.replace(problem, documents=1)
    some, _ = blocks(visible(whole)[0], 512)
    assert {name.split('_')[2] for name in found} == {'fwd', 'dkv', *([] if fused else ['dq'])}
    heads = problem.batch * problem.heads
    for name, visits in found.items():
        assert ('segmented' in name) == (problem.documents > 1)
        assert total(visits, 'run') == heads * some.sum()
        steps = sum(step.number for step in visits.steps)
        assert heads * some.sum() <= steps <= heads * some.size
        rows = problem.batch * problem.kv_heads if 'dkv' in name else heads
        assert total(visits, 'init') == total(visits, 'finish') == rows * len(some)


def test_forward_copies_each_query_block_once_and_each_key_block_when_due():
    problem = Problem(4096, heads=4, kv_heads=4)
    options = {'block': 1024, 'compute': 512}
    visits = jax_splash.candidate(problem, options).visits['splash_mha_fwd']
    once = 2 * 4096 * 128 * 2 + 2 * 4096 * 128 * 4  # q, out; positions, log-sum-exp
    # Blocks below the diagonal, but that the second row begins with the one of the first. A skipped
    # step fetches what the next row begins with.
    pairs = 1 + 2 + 3 + 4 - 1
    assert sum(s.number * s.hbm_bytes for s in visits.steps) == 4 * (once + 2 * pairs * 1024 * 256)
