"""Compiled forms of what `algorithms/` and `parallel/` define in torch, which stays the reference.

`cpu/` is compiled by numba, `triton/` by Triton for GPUs. Nothing here knows an objective's config; what runs in place of the
reference is chosen by `algorithms.fused`, `algorithms.compiled` and `parallel.compiled`. Neither package is imported before it is used.
"""
