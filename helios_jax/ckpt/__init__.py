"""Commands on whole checkpoints (`helios ckpt`): list, verify, compare, remove, average, export."""
