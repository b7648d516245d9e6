"""Memory policies: what becomes of the activations that a backward pass reads, and proof of it."""
