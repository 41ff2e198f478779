"""The page: one HTML file that opens from the disk and loads nothing."""
