"""Checkpoint formats, one file or folder each; `exporter.sources` detects the format."""
