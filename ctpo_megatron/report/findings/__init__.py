"""What of a run most deserves a look, found by rules that each read a few numbers."""
