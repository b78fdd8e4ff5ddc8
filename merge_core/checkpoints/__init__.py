"""Checkpoints: their files, tensors, and what each parameter is in its network."""
