"""Uses of a checkpoint: bits per byte on held-out text, and text that the model generates."""
