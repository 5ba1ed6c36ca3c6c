"""Sensitivity: what quantizing each unit costs, and the accuracy budget over it."""
