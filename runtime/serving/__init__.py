"""Serve one model to many callers: JSON requests, answered one at a time."""
