"""Proves packages: measures errors, finds their cause, reports them."""
