"""Calibration: histograms of activations, and how a scale is chosen from them."""
