"""A matrix -> codes: one file for each quantizer, chosen by name in `registry.py`."""
