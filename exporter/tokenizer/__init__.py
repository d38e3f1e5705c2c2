"""Reads the tokenizers of checkpoints, and converts them to tokenizer.json and its companions."""
