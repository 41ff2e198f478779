"""A run directory in a terminal: what is new in its files is read again and again, and shown as one frame."""
