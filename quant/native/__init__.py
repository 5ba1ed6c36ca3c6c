"""Fake quantization in C, one pass over memory for each operation; without a compiler quant/rounding.py does it."""
