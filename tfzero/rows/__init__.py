"""A batch's rows: how they are cut for the replicas, and what of a tensor depends on them."""
