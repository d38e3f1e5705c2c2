"""Make many packages from one list: here, or as tasks of a Ray cluster."""
