"""Runs under SLURM: job files, what a job was given, Ray in it, the check before it starts, and how it goes on."""
