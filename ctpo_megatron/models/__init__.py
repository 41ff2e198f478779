"""What a model is: its shape, its tensors, who owns them, and what config.json says. Needs neither torch nor megatron."""
