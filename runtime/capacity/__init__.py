"""What serving a load takes, computed from what was measured on one machine."""
