"""What runs in the process of a sink: Python and the sink's own package only, as its interpreter may have nothing else."""
