"""Megatron-Core behind one class; the only package that imports megatron."""
