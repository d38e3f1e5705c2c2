"""Commands, one module each with a click command called `command`, and what they share."""
