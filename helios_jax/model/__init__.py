"""The model in linen: attention, feed-forward and Gated Memory Units, layers, rope and loss."""
