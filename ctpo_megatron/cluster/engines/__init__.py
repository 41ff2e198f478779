"""The inference servers as Ray actors."""
