"""One training step of one rank of a layout, on tensors without memory and groups without other ranks."""
