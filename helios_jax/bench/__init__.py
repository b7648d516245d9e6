"""Measurements, one a file: time and memory, taken here or read from a compiler's schedule."""
