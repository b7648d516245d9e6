"""Hugging Face checkpoints, both ways.

`families` maps config.json and our config, `rope` the rotary settings in it, `names` the tensors,
each in one table for both directions. `importing` reads a directory onto a mesh, `exporting` writes
one, `workdir` makes an imported model a checkpoint like any other. Nothing in a directory is
executed or unpickled.
"""
