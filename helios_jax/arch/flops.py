"""FLOPs of a config, in closed form: dry_run, MFU, the planner and reports read the same numbers.

Per token: 6 · active matmul parameters (unembedding included) + 6 · L · T · N · H for causal
attention (forward and backward, the masked half left out). Recomputation does not count.
"""

from helios_jax.arch import weights
from helios_jax.config import Model


def active_matmul(model: Model) -> int:
    """Weights that one token is multiplied with: the unembedding included, the embedding not."""
    moe = model.moe
    total = weights.embedding(model).size if model.tied_embeddings else 0
    for weight in weights.all_weights(model):
        if weight.expert:
            total += weight.size // moe.num_experts * moe.num_experts_per_token
        elif weight.matmul:
            total += weight.size
    return total


def attention_flops(model: Model, row_length: int) -> float:
    """FLOPs of one token's attention, forward and backward, in a row that is one segment."""
    total = 0.0
    for kind in model.layer_kinds:
        keys = row_length / 2
        if kind.endswith('window') and model.window < row_length:
            keys = model.window - model.window**2 / (2 * row_length)
        total += 12 * keys * model.num_heads * model.head_dim
    return total


def flops_per_token(model: Model, row_length: int) -> float:
    """FLOPs of training on one token, for MFU."""
    return 6 * active_matmul(model) + attention_flops(model, row_length)


def segment_flops_per_token(model: Model, mean_context: float) -> float:
    """The same where a token sees `mean_context` tokens (itself included) on average."""
    return 6 * active_matmul(model) + attention_flops(model, round(2 * mean_context))
