"""Placement: which tensors are quantized, which share one scale, and the policy that edits it."""
