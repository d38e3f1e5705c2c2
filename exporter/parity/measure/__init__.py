"""Measures each kind of error separately."""
