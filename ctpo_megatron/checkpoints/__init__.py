"""Checkpoints as files: which of them count, and whether they are what was written. Needs neither megatron nor a GPU."""
