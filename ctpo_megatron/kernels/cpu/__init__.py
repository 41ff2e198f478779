"""What numba compiles for CPUs."""
