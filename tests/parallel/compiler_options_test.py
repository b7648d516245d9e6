"""The table of compiler options, a user's changes to it, and what this compiler does not know."""

import jax
import jax.numpy as jnp
import pytest

from helios_jax import chips, config
from helios_jax.errors import UserError
from helios_jax.parallel import compiler_options as options
from helios_jax.parallel import mesh as meshes


def test_no_option_has_two_values_in_one_place():
    for chip in chips.CHIPS.values():
        for program in (*options.PROGRAMS, options.TRANSFERS, options.SEVERAL):
            rows = [
                row.name
                for row in options.OPTIONS
                if program in row.programs and {chip.name, chip.platform} & set(row.places)
            ]
            assert len(rows) == len(set(rows)), (chip.name, program)


def test_every_row_is_for_chips_that_there_are_and_says_why():
    places = {*chips.CHIPS, *(chip.platform for chip in chips.CHIPS.values())}
    for row in options.OPTIONS:
        assert set(row.places) <= places
        assert row.reason and row.effect


def test_every_tpu_has_options_for_a_step_and_for_evaluation():
    assert {chip.name for chip in chips.CHIPS.values() if chip.platform == 'tpu'} == {*options.TPUS}
    for name in options.TPUS:
        step, evaluation = (options.of_table(name, 'tpu', program) for program in options.MODEL)
        assert evaluation.items() <= step.items()
        assert options.of_table(name, 'tpu', options.PREFILL, options.DECODING) == {}


def test_a_chip_that_the_table_lacks_has_its_platforms_options():
    assert options.of_table('', 'gpu', options.TRANSFERS) == {'xla_gpu_enable_command_buffer': ''}
    step = options.of_table('', 'gpu', options.STEP)
    assert step == {'xla_gpu_enable_dynamic_slice_fusion': False}
    assert options.of_table('', 'cpu', *options.PROGRAMS, options.TRANSFERS) == {}


def test_a_step_on_several_gpus_has_options_that_every_compiler_knows():
    several = options.of_table('', 'gpu', options.SEVERAL)
    assert several['xla_gpu_enable_latency_hiding_scheduler'] is True
    assert dict(options.known(jax.devices()[0], tuple(several.items()))) == several


def test_a_user_sets_changes_and_drops_options():
    table = {'xla_a': 3, 'xla_b': True}
    assert options.changed(table, '') == table
    assert options.changed(table, 'xla_c=x,y=2 -xla_a  xla_b=') == {'xla_b': '', 'xla_c': 'x,y=2'}
    assert table == {'xla_a': 3, 'xla_b': True}


@pytest.mark.parametrize(
    ('wanted', 'message'),
    [
        ('xla_a', "'xla_a' is neither NAME=VALUE nor -NAME"),
        ('-xla_a=2', "'-xla_a=2' is neither"),
        ('--xla_b=1', "'--xla_b=1' is neither"),
        ('-xla_d', '-xla_d drops what is not set; there are: xla_a, xla_b'),
    ],
)
def test_a_change_that_cannot_be_understood_is_refused(wanted, message):
    with pytest.raises(UserError, match=message):
        options.changed({'xla_a': 3, 'xla_b': True}, wanted)


def test_what_this_compiler_does_not_know_is_named_and_left_out(caplog):
    device = jax.devices()[3]
    wanted = 'xla_no_such_option=3 xla_cpu_enable_fast_math=false'
    for _ in range(2):
        with jax.set_mesh(meshes.make(config.Mesh())):  # as in a run
            found = options.resolve(device, options.STEP, wanted=wanted)
    assert found == {'xla_cpu_enable_fast_math': False}
    assert [r.message for r in caplog.records if 'xla_no_such_option' in r.message] == [
        'This compiler has no option xla_no_such_option: it is left out.'
    ]
    assert jax.jit(jnp.sin, compiler_options=found)(0.0) == 0.0


def test_a_value_that_the_compiler_cannot_read_is_one_line():
    with pytest.raises(UserError, match=r'train.compiler_options: .*banana'):
        options.resolve(
            jax.devices()[0], options.STEP, wanted='xla_backend_optimization_level=banana'
        )


@pytest.mark.slow
@pytest.mark.parametrize('name', options.TPUS)
def test_libtpu_knows_every_option_of_the_table(name, caplog):
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'helios_jax[tpu]'")
    device = meshes.topology_devices(chips.CHIPS[name].topology)[0]
    for program in options.PROGRAMS:
        found = options.resolve(device, program, transfers=True)
        assert found == options.of_table(name, 'tpu', program, options.TRANSFERS)
    assert 'left out' not in caplog.text
