"""Uses of a checkpoint: bits per byte, benchmarks, rows of any length, and generated text."""
