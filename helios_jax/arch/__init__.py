"""Facts about a config, found without JAX: weights, named tensors, FLOPs, buffers, mesh axes.

The model, the planner, the optimizer and the memory system read the same rows.
"""
