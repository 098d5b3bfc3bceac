"""Checkpoints for any number of workers, and what all workers do with files together."""
