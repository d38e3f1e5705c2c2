"""File formats that hold tensors. Nothing here depends on the Llama architecture."""
