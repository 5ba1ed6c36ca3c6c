"""Checkpoint files: reading them without executing anything, recognising, converting, saving."""
