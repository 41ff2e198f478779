"""Checkpoints as files: which count, whether they are what was written. Needs neither megatron nor a GPU."""
