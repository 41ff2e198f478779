"""Compiled forms of what `algorithms/`, `parallel/` and the model's layers define in torch, which stays the reference.

`cpu/` is compiled by numba, `triton/` by Triton for GPUs. Nothing here knows an objective's config. Neither package is imported
before what needs it is used.
"""
