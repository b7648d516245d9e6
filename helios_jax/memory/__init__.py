"""Memory policies: what becomes of the activations that a gradient reads, and evidence of it."""
