"""What is true of a config, without JAX: weights, named tensors, FLOPs, buffers, mesh axes.

The model, the planner, the optimizer and the memory system read the same rows.
"""
