"""Compare a package with its original over a corpus of any size."""
