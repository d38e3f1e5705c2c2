"""Scores on tasks of lm-eval's harness, which are files in a local folder."""
