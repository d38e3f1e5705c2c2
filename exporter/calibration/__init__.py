"""Passes tokens through a model, one layer in memory, and quantizes it by what they show."""
