"""File formats that hold tensors. Nothing here knows what a Llama is."""
