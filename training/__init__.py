"""Training: the loop, its schedule and weight average, and processes that share the work."""
