"""Predicts what a run needs before it runs: bytes, seconds, what fits, what to change."""
