"""A run directory as values: what is there is read, what is missing or damaged is said, and nothing of it ends a report."""
