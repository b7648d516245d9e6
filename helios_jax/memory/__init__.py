"""What a saved activation becomes (recomputed, quantised, offloaded), and evidence of it."""
