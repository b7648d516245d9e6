"""Measurement of training on several devices: meshes beside one device, and beside PyTorch."""
