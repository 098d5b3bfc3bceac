"""What replicas send each other: one group, whichever transport carries it."""
