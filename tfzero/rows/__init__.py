"""The rows of a batch: how they are cut for the replicas, and how tensors depend on them."""
