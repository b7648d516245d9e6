"""What each saved activation becomes: one table from tensor name to action.

The model names its intermediate tensors once (`config.Actions` lists them). A preset gives every
name an action, the user's actions override it, and `jax.checkpoint` carries the table out:

  remat    recomputed in the backward pass
  device   kept on the device as it is
  offload  kept in pinned host memory

`none` keeps everything and `dots` keeps the results of matmuls; both are policies of XLA's
primitives, not of names, and take no actions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from helios_jax import config

NAMES = tuple(field.name for field in dataclasses.fields(config.Actions))
# The kernel's own residuals: without them its forward pass would run again.
KERNEL_RESIDUALS = 'attention_residuals'

PRESETS: dict[str, dict[str, str]] = {
    'full': {'block_input': 'device'},
    'minimal': {
        name: 'device'
        for name in (
            'block_input',
            'q',
            'k',
            'v',
            'attention_output',
            'attention_update',
            'gate_up',
            'dispatched',
            'mlp_update',
        )
    },
    'offload': {'block_input': 'offload'},
}


def actions(memory: config.Memory) -> dict[str, str]:
    """Tensor name → action, the user's choices over the preset's.

    Raises:
      UserError: actions beside a policy that works on primitives, or a layer's input as `remat`.
    """
    chosen = {n: a for n, a in dataclasses.asdict(memory.actions).items() if a}
    config.require(
        not chosen or memory.policy in PRESETS,
        f'memory.policy={memory.policy!r} has no named tensors, but memory.actions sets '
        f'{", ".join(chosen)}; choose one of {", ".join(PRESETS)}.',
    )
    config.require(
        chosen.get('block_input') != 'remat',
        "memory.actions.block_input='remat', but a layer is recomputed from its input; choose "
        'device or offload.',
    )
    table = dict.fromkeys(NAMES, 'remat') | PRESETS.get(memory.policy, {}) | chosen
    # Routing again could break a tie otherwise than the forward pass did.
    if not chosen.get('router_choices'):
        table['router_choices'] = 'device'
    return table


def checkpoint_policy(memory: config.Memory) -> Callable[..., Any] | None:
    """The `jax.checkpoint` policy; None means no checkpoint at all: everything is saved."""
    table = actions(memory)
    if memory.policy == 'none':
        return None
    policies = jax.checkpoint_policies
    if memory.policy == 'dots':
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names('router_choices', KERNEL_RESIDUALS),
        )
    kept = [name for name, action in table.items() if action == 'device']
    if table['attention_output'] == 'device':
        kept.append(KERNEL_RESIDUALS)
    moved = [name for name, action in table.items() if action == 'offload']
    if not moved:
        return policies.save_only_these_names(*kept)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=moved,
        offload_src='device',
        offload_dst='pinned_host',
    )
