"""Several processes that serve the same package, behind one front."""
