"""Command line verbs, one file each; every module has a click command called `command`."""
