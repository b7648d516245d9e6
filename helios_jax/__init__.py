"""Helios: gated decoder-only language models in JAX.

One alphabet names every dimension, in signatures, einsums and docs:

B batch, T query length, S key length, D embed, N query heads, K key/value heads, G = N/K
(head n = k·G + g), H head, F mlp hidden, E experts, X experts per token, V vocabulary, L layers.
"""
