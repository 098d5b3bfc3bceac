"""Checkpoints for any number of workers, and the file work that all workers do together."""
