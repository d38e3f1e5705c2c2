"""The tokenizer of a package: tokens of texts, whatever its file says."""
