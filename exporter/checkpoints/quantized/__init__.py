"""Hugging Face folders with matrices stored as GPTQ or AWQ codes."""
