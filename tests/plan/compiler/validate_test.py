"""Some of the cases that `helios plan --validate` compiles: minutes each on two cores."""

import pytest

from helios_jax.plan import measured
from helios_jax.plan.compiler import validate

# Both kinds of layers, every policy, every topology, one in parts; .ci/release compiles all 34.
IN_CI = validate.StepCase('dense', 'full', 'v6e:2x2')
SOME = [
    IN_CI,
    validate.StepCase('moe', 'fp8', 'v5e:2x2'),
    validate.StepCase('dense', 'offload', 'v5e:2x2'),
    validate.StepCase('dense', 'fp8_offload', 'v5p:2x2x1', 4),
]


def test_the_cases_cover_layers_policies_and_topologies():
    assert len(set(validate.CASES)) == 34
    assert set(SOME) < set(validate.CASES)
    for field in ('layers', 'policy', 'topology'):
        assert {getattr(c, field) for c in SOME} == {getattr(c, field) for c in validate.CASES}


@pytest.mark.parametrize(
    'case',
    [
        pytest.param(case, marks=pytest.mark.slow if case == IN_CI else pytest.mark.long)
        for case in SOME
    ],
    ids=str,
)
def test_the_closed_form_is_near_the_compiler(case):
    pytest.importorskip('libtpu')
    row = validate.errors(case)
    assert row['within'], validate.line(row)


def test_a_row_outside_its_limits_is_counted():
    row = {
        'layers': 'dense',
        'policy': 'full',
        'topology': 'v5e:2x2',
        'backward_parts': 4,
        'axis': '',
        'within': False,
    }
    for name in ('arguments', 'live_temp', 'peak', 'host_temp'):
        row |= {f'{name}_predicted': 1.0, f'{name}_compiled': 1.25, f'{name}_error': -0.2}
    assert '-20.0%' in validate.line(row)
    text = '\n'.join(validate.summary([row, row | {'within': True}]))
    assert 'peak 20.0%' in text
    assert '20.0% below the compiler' in text
    assert '1 of 2 cases' in text


@pytest.mark.parametrize('within', [True, False])
def test_a_report_says_when_each_figure_was_last_true_and_fails_beyond_the_limits(
    within, capsys, monkeypatch
):
    row = {'layers': 'dense', 'policy': 'full', 'topology': 'v5e:2x2', 'backward_parts': 1}
    row |= {'axis': 'context'}
    for name in ('arguments', 'live_temp', 'peak', 'host_temp'):
        row |= {f'{name}_predicted': 1.0, f'{name}_compiled': 1.25, f'{name}_error': -0.2}
    monkeypatch.setattr(validate, 'errors', lambda case: row | {'within': within})
    if within:
        validate.compare_all(as_json=False)
    else:
        with pytest.raises(SystemExit, match='1'):
            validate.compare_all(as_json=False)
    out = capsys.readouterr().out
    assert 'last true; now jax ' in out
    for name, figure in measured.figures().items():
        assert f'{name} ' in out and figure.seen in out
