"""Compiled forms of what `algorithms/` and `parallel/` define in torch, which stays the reference.

`cpu/` is compiled by numba, `triton/` by Triton for GPUs. Nothing here knows an objective's config. Neither package is imported
before what needs it is used.
"""
