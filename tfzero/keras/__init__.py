"""Where Keras must be told about replicas: the patches, and what they do."""
