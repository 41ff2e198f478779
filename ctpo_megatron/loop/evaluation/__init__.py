"""Evaluation: attempts at benchmarks, what their outcomes estimate, and when a run makes them. docs/evaluation.md explains it."""
