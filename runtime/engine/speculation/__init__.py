"""Drafts of the next tokens, which one step of the graph verifies, and when they pay."""
