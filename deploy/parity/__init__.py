"""Comparing an engine with torch: outputs and codes."""
