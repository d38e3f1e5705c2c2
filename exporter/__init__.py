"""Checkpoint -> model package."""
