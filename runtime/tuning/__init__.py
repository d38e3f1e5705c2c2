"""What suits a package on this machine: measured once, kept in the user's cache folder."""
