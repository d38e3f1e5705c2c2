"""Where a package goes: the targets, the package folder itself and the errors. Stdlib only."""
