"""Checkpoint -> package: planned, written one matrix at a time, tried, named."""
