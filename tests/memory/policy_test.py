"""The table of actions: presets, the user's choices over them, and what is refused."""

import pytest

from helios_jax import config
from helios_jax.config.run import ACTIONS, POLICIES
from helios_jax.errors import UserError
from helios_jax.memory import policy


def test_presets_name_tensors_and_actions_that_exist():
    assert {*policy.PRESETS, 'none', 'auto'} == set(POLICIES)
    for preset in policy.PRESETS:
        table = policy.actions(config.Memory(preset))
        assert tuple(table) == policy.NAMES
        # A preset is made of what a user may write.
        config.Actions(**table)


@pytest.mark.parametrize(
    ('action', 'parsed'),
    [
        ('remat', (False, '', False)),
        ('device', (True, '', False)),
        ('fp8', (True, 'fp8', False)),
        ('int8', (True, 'int8', False)),
        ('offload', (True, '', True)),
        ('fp8+offload', (True, 'fp8', True)),
        ('int8+offload', (True, 'int8', True)),
    ],
)
def test_an_action_is_a_form_and_a_place(action, parsed):
    assert action in ACTIONS
    assert policy.parse(action) == parsed


@pytest.mark.parametrize('preset', ['none'])
def test_actions_beside_a_preset_without_names_are_refused(preset):
    memory = config.Memory(preset, actions=config.Actions(q='offload', mlp_gate='device'))
    with pytest.raises(UserError, match=f'{preset!r}.*q, mlp_gate.*minimal, full, fp8'):
        policy.actions(memory)


def test_a_policy_still_to_be_resolved_is_refused():
    with pytest.raises(UserError, match=r"'auto'.*helios train.*none, minimal"):
        policy.actions(config.Memory('auto'))


def test_unknown_actions_and_presets_are_refused():
    with pytest.raises(UserError, match=r"memory\.actions\.q='ofload'.*Did you mean 'offload'"):
        config.Actions(q='ofload')
    with pytest.raises(UserError, match=r"memory\.policy='ful'.*Did you mean 'full'"):
        config.Memory('ful')
    with pytest.raises(UserError, match=r"memory\.optimizer='hots'.*Did you mean 'host'"):
        config.Memory(optimizer='hots')


@pytest.mark.parametrize('name', ['log_sum_exp', 'router_choices'])
@pytest.mark.parametrize('action', ['fp8', 'int8+offload'])
def test_what_must_stay_exact_cannot_be_rounded(name, action):
    with pytest.raises(UserError, match=rf'{name}=.*round.*remat, device, offload'):
        config.Actions(**{name: action})


def test_a_layers_input_cannot_be_recomputed():
    memory = config.Memory('minimal', actions=config.Actions(block_input='remat'))
    with pytest.raises(UserError, match=r"block_input='remat'.*device, fp8 or offload"):
        policy.actions(memory)


def test_the_users_action_overrides_the_presets():
    chosen = config.Actions(q='remat', mlp_gate='offload', gate_up='int8+offload')
    table = policy.actions(config.Memory('fp8', actions=chosen))
    preset = policy.actions(config.Memory('fp8'))
    changed = {name: action for name, action in table.items() if action != preset[name]}
    assert changed == {'q': 'remat', 'mlp_gate': 'offload', 'gate_up': 'int8+offload'}


def test_a_kernel_keeps_queries_keys_and_values_in_the_form_they_share():
    of = lambda **actions: policy.kernel_form(
        policy.actions(config.Memory('full', actions=config.Actions(**actions)))
    )
    assert of(q='fp8', k='fp8', v='fp8+offload') == 'fp8'
    assert of(q='fp8', k='int8', v='fp8') == ''
    assert of() == ''
