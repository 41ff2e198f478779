"""Harnesses of others that need more than an address: each in its own words, in processes with its own packages."""
