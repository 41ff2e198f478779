"""Arithmetic about a run before it is started: parameters, memory, batches, groups of ranks. Needs neither torch nor megatron."""
