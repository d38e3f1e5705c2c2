"""A package and the runtime, made ready for one place."""
