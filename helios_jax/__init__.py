"""Helios: gated decoder-only language models in JAX.

One alphabet names every dimension, in signatures, einsums and docs:

B batch, T query length, S key length, D embed, N query heads, K key/value heads, G = N/K
(head n = k·G + g), H head, F mlp hidden, E experts, X experts per token, V vocabulary, L layers.

    model, variables, tokenizer, config = helios_jax.restore('runs/tiny')
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helios_jax.restoring import Restored, restore

__all__ = ['Restored', 'restore']
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
    # On demand: the processes that tokenize import this package too, and need no JAX.
    if name in __all__:
        from helios_jax import restoring

        return getattr(restoring, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
