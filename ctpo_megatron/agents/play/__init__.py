"""Attempts that are played by agents of others: their keys, their processes, their end."""
