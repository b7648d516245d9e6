"""Runs studies: variants of one config, paired by seed, and what they have in common and apart."""
