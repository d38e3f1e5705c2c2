"""Which provider runs which node, and proof of it."""
