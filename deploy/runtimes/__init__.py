"""Engines: one module for each runtime, behind one interface."""
