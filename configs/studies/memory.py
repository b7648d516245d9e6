"""What does a memory policy cost? Its seconds and its bytes, and the loss that FP8 or int8 ends at.

helios ablate --study=memory --workdir=runs/memory \
    --config.data.corpus='linux/Documentation/**/*.rst'

`full` and `offload` compute what `minimal` does, so that their losses differ by rounding alone, and
show how far that carries. FP8 and int8 round what the backward pass reads.
"""

from helios_jax.ablate.study import Study

ROUNDED = (
    'block_input', 'q', 'k', 'v', 'attention_output', 'attention_update', 'gate_up', 'mlp_update',
)  # fmt: skip


def get_study() -> Study:
    return Study(
        question='What do memory policies cost in loss, in seconds and in bytes?',
        config='study_77m',
        baseline='minimal',
        arms={
            'minimal': {},
            'full': {'memory.policy': 'full'},
            'offload': {'memory.policy': 'offload'},
            'fp8': {'memory.policy': 'fp8'},
            'int8': {'memory.policy': 'fp8'}
            | {f'memory.actions.{name}': 'int8' for name in ROUNDED},
        },
        equal=('tokens', 'parameters', 'flops'),
    )
