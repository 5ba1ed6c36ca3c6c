"""The run directory, progress and terminal output."""
