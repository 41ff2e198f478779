"""The figures of CTPO's paper (arXiv 2605.07331), from what a run has recorded."""
