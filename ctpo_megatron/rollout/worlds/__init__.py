"""Multi-turn environments: a user's own, and those of other packages."""
