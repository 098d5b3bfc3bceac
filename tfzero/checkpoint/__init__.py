"""Checkpoints that do not know the world size, and what all workers do with files together."""
