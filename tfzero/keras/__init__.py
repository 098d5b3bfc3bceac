"""Patches that make Keras aware of replicas, and what they call."""
