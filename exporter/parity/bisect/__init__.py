"""Finds the operator, weight or table that made a package miss its limits."""
