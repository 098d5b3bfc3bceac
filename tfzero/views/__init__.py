"""Views for users: audits, pictures, TensorBoard, and the examination of a cluster."""
