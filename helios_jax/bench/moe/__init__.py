"""`helios bench moe`: the products of mixtures of experts."""
