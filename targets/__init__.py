"""Targets, providers, the formats of packages and bundles, and errors. Standard library only."""
