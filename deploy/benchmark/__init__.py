"""Latency of engines: timing, scenarios, layer times."""
