"""FLOPs and parameters of a config, in closed form: dry_run, MFU and reports read the same numbers.

Per token: 6 · active matmul parameters (unembedding included) + 6 · L · T · N · H for causal
attention (forward and backward, the masked half left out; a layer with a window counts the keys
that it sees). Neither recomputation nor what experts drop counts.
"""

import math
from typing import NamedTuple

from helios_jax.config import Model

# Dense bfloat16 peak of one device as JAX counts devices, FLOP/s, by a part of its device_kind.
PEAK_FLOPS = {
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 2307e12 / 2,  # JAX shows each of its two cores
    'TPU v4': 275e12,
    'H100': 989e12,
    'H200': 989e12,
    'A100': 312e12,
}

CHUNK_LOGITS_BYTES = 2**28  # of one device's float32 logits in the loss; larger gains nothing


class Parameters(NamedTuple):
    total: int  # vocabulary padded, as stored
    matmul: int  # weights of matmuls, unembedding included, embedding not
    active_matmul: int  # of those, what one token visits


def parameters(model: Model) -> Parameters:
    """Counts of the weights that `Transformer` makes."""
    D, N, K, H = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim
    attention = D * H * (2 * N + 2 * K)
    gate, gate_vectors = _gate(model)
    norms = 2 * D + (2 * H if model.qk_norm else 0) + 2 * gate_vectors
    matmul = active = vectors = 0
    for kind in model.layer_kinds:
        mlp = active_mlp = 3 * D * model.mlp_dim
        if kind.startswith('moe'):
            moe, one = model.moe, 3 * D * model.expert_mlp_dim
            shared = moe.num_shared_experts * one + D * moe.num_experts
            mlp = moe.num_experts * one + shared
            active_mlp = moe.num_experts_per_token * one + shared
        matmul += attention + mlp + 2 * gate
        active += attention + active_mlp + 2 * gate
        vectors += norms
    head = D * model.padded_vocab_size
    stored_heads = 1 if model.tied_embeddings else 2
    total = matmul + vectors + D + stored_heads * head
    return Parameters(total, matmul + head, active + head)


def _gate(model: Model) -> tuple[int, int]:
    """One GMU's matmul weights, and its vectors' elements."""
    D, gmu = model.embed_dim, model.gmu
    norm = D if gmu.normalizes else 0
    if not gmu.has_gate:
        return 0, norm + {'residual': 0, 'layerscale': D, 'rezero': 1}[gmu.kind]
    inputs = 1 if gmu.kind == 'highway' else 2
    if gmu.gate == 'static':
        return 0, norm + D
    if gmu.gate == 'low_rank':
        return (inputs + 1) * D * model.gate_width, norm + D
    return inputs * D * model.gate_width, norm + model.gate_width


def attention_flops(model: Model, row_length: int) -> float:
    """FLOPs of a token, forward and backward, in a row that is one segment."""
    window_keys = row_length / 2
    if model.window < row_length:
        window_keys = model.window - model.window**2 / (2 * row_length)
    return context_flops(model, row_length / 2, window_keys)


def context_flops(model: Model, keys: float, window_keys: float) -> float:
    """FLOPs of a token's attention, forward and backward.

    Args:
      keys: tokens that it sees.
      window_keys: those that it sees in a layer with a window.
    """
    total = 0.0
    for kind in model.layer_kinds:
        seen = window_keys if kind.endswith('window') else keys
        total += 12 * seen * model.num_heads * model.head_dim
    return total


def dropped_flops(model: Model, drop_fraction: float) -> float:
    """FLOPs a token that are left out where experts drop this share of (token, expert) pairs."""
    num_layers = sum(kind.startswith('moe') for kind in model.layer_kinds)
    num_pairs = drop_fraction * model.moe.num_experts_per_token * num_layers
    return 6 * num_pairs * 3 * model.embed_dim * model.expert_mlp_dim


def flops_per_token(model: Model, row_length: int) -> float:
    """FLOPs of training a token, for MFU."""
    return 6 * parameters(model).active_matmul + attention_flops(model, row_length)


def segment_flops_per_token(
    model: Model, mean_context: float, mean_window_context: float = 0.0
) -> float:
    """FLOPs of training a token that sees so many tokens, itself included, on average.

    Args:
      mean_window_context: tokens seen in a layer with a window, where the model has such layers.
    """
    attention = context_flops(model, mean_context, mean_window_context)
    return 6 * parameters(model).active_matmul + attention


def peak_flops(device_kind: str) -> float:
    """FLOP/s of one device, NaN if the table lacks it."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in device_kind), math.nan)


def loss_chunks(batch_rows: int, row_length: int, vocab_size: int, num_devices: int) -> int:
    """Parts that model/loss.py cuts rows into: the fewest whose logits stay within bounds.

    A divisor of `row_length` that keeps a chunk's logits below `CHUNK_LOGITS_BYTES` on each device.

    Args:
      batch_rows: of all devices.
      vocab_size: padded.
    """
    wanted = batch_rows * row_length * vocab_size * 4 / num_devices / CHUNK_LOGITS_BYTES
    divisors = (c for c in range(1, row_length + 1) if row_length % c == 0)
    return next(c for c in divisors if c >= min(wanted, row_length))
