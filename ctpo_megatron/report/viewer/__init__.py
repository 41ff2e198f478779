"""The trajectories of a run, one by one and token by token, in a page that opens from a disk."""
