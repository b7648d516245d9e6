"""Table of what each saved activation becomes: tensor name → action.

The model names its intermediate tensors once (arch/tensors.py lists them). A preset gives every
name an action, the user's actions override it, and memory/store.py carries the table out:

  remat                      recomputed in the backward pass
  device                     kept on the device as it is
  fp8, int8                  kept on the device in a byte a value (kernels/quantize)
  offload                    kept in pinned host memory
  fp8+offload, int8+offload  both

`none` leaves it all to differentiation: everything is saved, nothing has a name. A name that a
model does not have, or that its backward pass never reads, costs nothing under a preset.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from helios_jax import config
from helios_jax.arch.tensors import NAMES
from helios_jax.errors import require

# Tensors of the functions whose backward pass memory.backward_parts cuts.
IN_PARTS = ('attention_gate', 'gate_up', 'mlp_gate')

# Results of matmuls and of collectives, dear to recompute; sorting rows by expert again is not.
# Without its log-sum-exp attention would run again.
MATMULS = (
    'block_input', 'q', 'k', 'v', 'attention_output', 'attention_update', 'gate_up', 'dispatched',
    'mlp_update',
)  # fmt: skip
GATES = ('attention_gate', 'mlp_gate')
PRESETS: dict[str, dict[str, str]] = {
    'minimal': dict.fromkeys((*MATMULS, 'log_sum_exp', *GATES), 'device'),
    'full': {'block_input': 'device'},
    'fp8': dict.fromkeys(MATMULS, 'fp8') | {'log_sum_exp': 'device'},
    'offload': {'block_input': 'offload'},
    'fp8_offload': {'block_input': 'fp8+offload'},
}


class Action(NamedTuple):
    saved: bool
    form: str  # '' as it is, or one of kernels.quantize.FORMATS
    host: bool


def parse(action: str) -> Action:
    form, _, place = action.rpartition('+')
    if action in ('fp8', 'int8'):
        form, place = action, 'device'
    return Action(action != 'remat', form, place == 'offload')


def actions(memory: config.Memory) -> dict[str, str]:
    """Tensor name → action, the user's choices over the preset's.

    Raises:
      UserError: actions beside a policy that names nothing, a layer's input as `remat`, a tensor
        saved that is to be recomputed in parts, or a policy that is still to be resolved.
    """
    chosen = chosen_actions(memory)
    require(
        memory.policy != 'auto',
        "memory.policy='auto' is for `helios train` and `helios plan`, which know the device; here "
        f'choose one of none, {", ".join(PRESETS)}.',
    )
    require(
        not chosen or memory.policy in PRESETS,
        f'memory.policy={memory.policy!r} has no named tensors, but memory.actions sets '
        f'{", ".join(chosen)}; choose one of {", ".join(PRESETS)}.',
    )
    require(
        chosen.get('block_input') != 'remat',
        "memory.actions.block_input='remat', but a layer is recomputed from its input; choose "
        'device, fp8 or offload.',
    )
    table = _completed(chosen, memory)
    in_parts = [name for name in IN_PARTS if table[name] != 'remat']
    require(
        memory.backward_parts == 1 or not in_parts,
        f'memory.backward_parts={memory.backward_parts} recomputes {", ".join(IN_PARTS)} in parts, '
        f'but {in_parts[0] if in_parts else ""} is saved; choose a policy such as full, or '
        'memory.backward_parts=1.',
    )
    return table


def _completed(chosen: Mapping[str, str], memory: config.Memory) -> dict[str, str]:
    # Routing again could break a tie otherwise than the forward pass did.
    table = dict.fromkeys(NAMES, 'remat') | {'router_choices': 'device', 'final_hidden': 'device'}
    table |= PRESETS.get(memory.policy, {})
    if memory.backward_parts > 1:
        table |= dict.fromkeys(GATES, 'remat')  # which run in parts
    return table | dict(chosen)


def chosen_actions(memory: config.Memory) -> dict[str, str]:
    """Actions that the user asked for by name."""
    return {n: a for n, a in dataclasses.asdict(memory.actions).items() if a}


def uses_host(memory: config.Memory) -> bool:
    """True if anything moves between host and device in a step: the state or a saved tensor."""
    if memory.on_host or memory.policy == 'none':
        return memory.on_host
    return any(parse(action).host for action in actions(memory).values())


def kernel_form(table: Mapping[str, str]) -> str:
    """The form that q, k and v share, in which a kernel that can keeps them by itself; or ''."""
    forms = {parse(table[name]).form for name in ('q', 'k', 'v')}
    return forms.pop() if len(forms) == 1 else ''
