"""Post-training repair: rounding, bias correction, cross-layer equalization."""
