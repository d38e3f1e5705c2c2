"""Hugging Face folders with matrices stored as codes: GPTQ, AWQ, compressed-tensors."""
