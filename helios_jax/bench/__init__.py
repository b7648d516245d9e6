"""Measurements, one a file: what time and memory things take, here or by a compiler's schedule."""
