"""Numbers that the reference and its compiled forms share."""

from __future__ import annotations

FRACTION_BITS = 38  # of exact sums
MAX_ABS = 20.0  # of a token's log-ratio, and of what exact sums add up
MAX_LOG_RATIO = 10.0  # of the reference implementation: exp(10) is far outside every clip window
TINY = 1e-8  # probabilities are held to [TINY, 1 - TINY] in a KL divergence

POSITION_BINS = 16  # bin b holds positions 2**b .. 2**(b+1)-1 among a trajectory's policy tokens, the last one all from 2**15 on
DECILES = 10  # decile k holds the tokens with k/10 to (k+1)/10 of their trajectory's policy tokens before them
BUCKETS = 63  # of log-ratios; odd: 0 is in the middle of one, so rounding does not move what has not moved
SIGNS = 3  # of the advantage: negative, zero, positive
