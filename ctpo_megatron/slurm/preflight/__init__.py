"""The check of a job's nodes before the first GPU-second: one task on each, which meet at the first and report to it."""
