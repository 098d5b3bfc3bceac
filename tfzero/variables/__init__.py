"""The variables of a strategy: equal on all replicas, or in shards."""
