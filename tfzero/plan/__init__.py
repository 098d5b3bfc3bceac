"""Arithmetic without TensorFlow: who owns which elements, and how many bytes travel."""
