"""Where processes meet through torch: one gloo device for a process's groups, and stores that listen at one address."""
