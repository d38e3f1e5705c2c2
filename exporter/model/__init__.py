"""The Llama architecture: its config, its tensors, and how each matrix is stored."""
