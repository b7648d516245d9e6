"""Data: corpora, tokenizers, and documents packed into cached rows, from which batches are read."""
