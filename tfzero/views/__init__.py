"""What users look at: audits, pictures, TensorBoard, and the examination of a cluster."""
