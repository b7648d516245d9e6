"""Verifies kernels: float64 oracles, cases to judge, and bounds that errors must keep."""
