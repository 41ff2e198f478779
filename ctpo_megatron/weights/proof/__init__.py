"""The proof that the servers hold, and compute with, what was sent."""
