"""A whole train step on a TPU by its compiled program: ours beside MaxText's of the same shape."""
