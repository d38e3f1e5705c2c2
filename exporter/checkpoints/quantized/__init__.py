"""Hugging Face folders whose matrices are GPTQ or AWQ codes."""
