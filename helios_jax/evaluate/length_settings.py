"""Settings of an evaluation at several lengths (lengths.py), without JAX."""

import dataclasses
from collections.abc import Callable
from typing import Any

from helios_jax.errors import one_of, require

# Settings of model.rope for rows that are s times as long as the trained length, 1 or more.
METHODS: dict[str, Callable[[float], dict[str, Any]]] = {
    'none': lambda s: {'scaling': 'none', 'factor': 1.0},
    'pi': lambda s: {'scaling': 'linear', 'factor': s},
    'ntk': lambda s: {'scaling': 'ntk', 'factor': 1.0},
    'yarn': lambda s: {'scaling': 'static', 'factor': s},
    'dynamic': lambda s: {'scaling': 'dynamic', 'factor': 1.0},
}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Settings of `measure`, as the flags of `helios eval` name them."""

    lengths: tuple[int, ...]  # tokens of a row, BOS among them
    methods: tuple[str, ...] = tuple(METHODS)
    text: str = ''  # corpus to read; '' is the run's held-out text
    documents: int = 10  # at most; each as long as the longest row
    trials: int = 10  # prompts of each task, and of each depth of passkeys
    stride: int = 256  # tokens
    batch_rows: int = 16  # rows of the run's length at a time; of longer rows fewer
    seed: int = 0
    allow_lossy_tokenizer: bool = False

    def __post_init__(self) -> None:
        require(len(self.lengths) > 0, '--lengths names no length; give some, such as 512,1024.')
        require(len(self.methods) > 0, f'--methods is empty; give some of {", ".join(METHODS)}.')
        for name in ('lengths', 'methods'):
            given = getattr(self, name)
            require(
                len(set(given)) == len(given), f'--{name} names one twice: {given}; name it once.'
            )
        for method in self.methods:
            one_of('--methods', method, METHODS)
        for name in ('documents', 'stride', 'batch_rows'):
            require(getattr(self, name) > 0, f'--{name}={getattr(self, name)} must be above 0.')
        require(self.trials >= 0, f'--trials={self.trials} must be 0 (no prompts) or more.')
        require(
            min(self.lengths) >= self.stride + 2,
            f'--lengths has {min(self.lengths)}, which must be at least --stride={self.stride} and '
            'two more, for BOS and a token to read; raise one or lower the other.',
        )
