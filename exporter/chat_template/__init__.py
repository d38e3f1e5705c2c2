"""A chat template written so that every engine that reads the package makes the same prompts."""
