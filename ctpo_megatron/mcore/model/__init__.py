"""The model as Megatron-Core modules."""
