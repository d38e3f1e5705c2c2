"""A finished package read back as a checkpoint."""
