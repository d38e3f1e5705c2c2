"""Checkpoint formats, one file or folder each; `exporter.sources` tells them apart."""
