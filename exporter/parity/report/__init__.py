"""A proof in words, on a page."""
