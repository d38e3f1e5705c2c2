"""Reads a finished package back as a checkpoint."""
