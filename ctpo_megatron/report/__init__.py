"""What a run directory tells, as one page, as figures and as numbers: reads files, and asks no process anything."""
