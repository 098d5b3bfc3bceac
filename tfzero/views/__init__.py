"""What a user looks at: audits, pictures, TensorBoard, and the examination of a cluster."""
