"""Compiled forms of what `algorithms/`, `parallel/` and the model's layers define in torch, which stays the reference.

`cpu/` is compiled by numba, but for products, which are oneDNN's; `triton/` by Triton for GPUs. Nothing here knows an objective's
config. Neither numba nor Triton is imported before what needs it is used.
"""
