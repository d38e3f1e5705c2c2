"""Makes a package of a checkpoint: plans it, writes it matrix by matrix, and tests it."""
