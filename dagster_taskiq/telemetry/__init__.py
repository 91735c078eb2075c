"""Optional: what others may watch a deployment by."""
