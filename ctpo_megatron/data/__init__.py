"""Files of prompts in, training batches out."""
