"""What numba compiles for CPUs, and products that oneDNN computes there."""
