"""Problems, and the programs of the layer around a candidate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_shapes import PROBLEMS, visible

from helios_jax.bench.attention import problem as problems
from helios_jax.bench.attention import task
from helios_jax.bench.attention.problem import PASSES, Problem
from helios_jax.errors import UserError


@pytest.mark.parametrize('problem', PROBLEMS, ids=str)
def test_a_problem_counts_what_its_mask_leaves(problem):
    ids, positions = problem.segment_ids, problem.positions
    assert ids.shape == positions.shape == (problem.batch, problem.length)
    assert all(np.unique(row).tolist() == [*range(1, problem.documents + 1)] for row in ids)
    assert np.all(np.diff(ids) >= 0)
    starts = np.diff(ids, prepend=0, axis=1) > 0
    np.testing.assert_array_equal(positions == 0, starts)
    assert np.all((np.diff(positions) == 1) | starts[:, 1:])
    pairs = int(visible(problem).sum())
    assert problem.flops('forward') == 2 * 2 * 6 * 128 * pairs
    assert problem.flops('backward') == 2.5 * problem.flops('forward')


def test_a_problem_that_cannot_be_is_refused():
    with pytest.raises(UserError, match='kv_heads=3 must divide --heads=8'):
        Problem(128, heads=8, kv_heads=3)
    with pytest.raises(UserError, match=r'documents=129.*128'):
        Problem(128, documents=129)


@pytest.mark.parametrize('alone', [False, True])
@pytest.mark.parametrize('name', ['nothing', 'jax_splash', 'tokamax'])
def test_programs_have_the_layers_results(name, alone, request):
    if name == 'tokamax':
        request.getfixturevalue('tokamax')
    problem = Problem(1024, batch=2, heads=4, kv_heads=2, documents=2)
    implementation = task.IMPLEMENTATIONS[name]
    for which in PASSES:
        options = implementation.variants(problem, which, 'v5e')[0]
        candidate = implementation.candidate(problem, options)
        function, arguments = problems.program(problem, candidate, which, alone=alone)
        results = jax.eval_shape(function, *arguments)
        if which == 'forward':
            out = results[0]
            shapes = jax.tree.map(lambda x: x.shape, arguments[0])
            width = (2, 4, 1024, 128) if alone else (2, 1024, 512)
            assert (out.shape, out.dtype) == (width, jnp.bfloat16)
        else:
            assert jax.tree.map(lambda x: x.shape, results) == shapes
