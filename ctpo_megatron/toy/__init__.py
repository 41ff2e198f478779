"""A tiny model and a task for it, for the quickstart and the tests."""
