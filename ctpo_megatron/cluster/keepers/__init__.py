"""Processes that hold copies of the trainer's state in their memory."""
