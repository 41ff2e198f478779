"""Ray: processes, their placement and their supervision."""
