"""Several processes that serve the same package, after one front."""
