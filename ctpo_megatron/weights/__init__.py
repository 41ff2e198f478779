"""Publication of the trainer's weights to the inference servers."""
