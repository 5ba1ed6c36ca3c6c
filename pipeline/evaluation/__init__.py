"""Evaluation: from network or engine outputs to figures."""
