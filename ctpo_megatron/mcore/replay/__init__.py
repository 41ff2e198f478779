"""A dumped step run again on a trainer's ranks, with eyes on every module, parameter and token."""
