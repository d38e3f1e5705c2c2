"""Quantizers, which turn a matrix into codes: one file each, listed by name in `registry.py`."""
