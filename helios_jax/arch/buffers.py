"""Sizes of buffers that are neither weights nor named tensors, which the planner counts too."""

import math

CHUNK_LOGITS_BYTES = 2**28  # bytes of one device's float32 logits in the loss; larger gains nothing
CUDNN_SEGMENTS = 8  # M, segments of a row in one call; above 1, or jax takes the rows for unpacked


def loss_chunks(batch_rows: int, row_length: int, vocab_size: int, num_devices: int) -> int:
    """Number of chunks that the loss cuts rows into: the fewest whose logits stay within bounds.

    It divides `row_length`, and a chunk's logits take at most `CHUNK_LOGITS_BYTES` a device.

    Args:
      batch_rows: rows on all devices.
      vocab_size: V, padded.
    """
    wanted = batch_rows * row_length * vocab_size * 4 / num_devices / CHUNK_LOGITS_BYTES
    divisors = (c for c in range(1, row_length + 1) if row_length % c == 0)
    return next(c for c in divisors if c >= min(wanted, row_length))


def expert_capacity(num_pairs: int, num_experts: int, capacity_factor: float) -> int:
    """Slots of each expert for so many (token, choice) pairs; 0: no limit, nothing is dropped."""
    return math.ceil(capacity_factor * num_pairs / num_experts)
