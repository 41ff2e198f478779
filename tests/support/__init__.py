"""Helpers of the tests: oracles, planted faults, ranks and servers that tests start."""
