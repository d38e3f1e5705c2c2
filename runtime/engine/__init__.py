"""Sequences over one session, and how the next token of each is chosen."""
