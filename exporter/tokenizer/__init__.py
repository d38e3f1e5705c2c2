"""Vocabularies of other formats, made into tokenizer.json and its companions."""
