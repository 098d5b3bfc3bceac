"""The step of one replica: its loss, the walk of its gradients, the update of its shards."""
