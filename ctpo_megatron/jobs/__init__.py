"""What the commands do: each job checks its input, puts the parts together and runs a loop."""
