"""FLOPs of a config, in closed form: dry_run, MFU, the planner and reports read the same numbers.

Per token: 6 · active matmul parameters (unembedding included) + 6 · L · T · N · H for causal
attention (forward and backward, the masked half left out; a layer with a window counts the keys
that it sees). Recomputation does not count, and neither do the tokens that experts drop.
"""

from helios_jax.arch import weights
from helios_jax.config import Model


def active_matmul(model: Model) -> int:
    """Number of weights that multiply one token: with the unembedding, without the embedding.

    A weight that multiplies each of several streams counts for each.
    """
    moe = model.moe
    total = weights.embedding(model).size if model.tied_embeddings else 0
    for weight in weights.all_weights(model):
        if weight.expert:
            total += weight.size // moe.num_experts * moe.num_experts_per_token
        elif weight.matmul:
            total += weight.size * weight.uses
    return total


def attention_flops(model: Model, row_length: int) -> float:
    """FLOPs of a token's attention, forward and backward, in a row that is one segment."""
    window_keys = row_length / 2
    if model.window < row_length:
        window_keys = model.window - model.window**2 / (2 * row_length)
    return context_flops(model, row_length / 2, window_keys)


def context_flops(model: Model, keys: float, window_keys: float) -> float:
    """FLOPs of a token's attention, forward and backward.

    Args:
      keys: tokens that it sees.
      window_keys: tokens that it sees in a layer with a window.
    """
    total = 0.0
    for kind, layers in model.kind_counts.items():
        seen = window_keys if kind.endswith('window') else keys
        total += layers * 12 * seen * model.num_heads * model.head_dim
    return total


def dropped_flops(model: Model, drop_fraction: float) -> float:
    """FLOPs a token that are left out where experts drop this share of (token, expert) pairs."""
    num_layers = sum(n for kind, n in model.kind_counts.items() if kind.startswith('moe'))
    num_pairs = drop_fraction * model.moe.num_experts_per_token * num_layers
    return 6 * num_pairs * 3 * model.embed_dim * model.expert_mlp_dim


def flops_per_token(model: Model, row_length: int) -> float:
    """FLOPs of training on one token, for MFU."""
    return 6 * active_matmul(model) + attention_flops(model, row_length)


def segment_flops_per_token(
    model: Model, mean_context: float, mean_window_context: float = 0.0
) -> float:
    """FLOPs of training a token that sees `mean_context` tokens on average, itself included.

    Args:
      mean_window_context: tokens seen in a layer with a window, where the model has such layers.
    """
    return 6 * active_matmul(model) + context_flops(model, mean_context, mean_window_context)
