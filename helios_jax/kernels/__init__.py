"""Kernels as pure functions of arrays: attention, grouped matmul and quantisation of rows."""
