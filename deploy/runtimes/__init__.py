"""Engines: one module for each runtime, with one interface."""
