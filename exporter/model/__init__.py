"""What a Llama is: its numbers, its tensors, and how each of its matrices is stored."""
