"""How fast a package is on this machine."""
