"""Prints a report on the terminal, and writes it to an HTML page."""
