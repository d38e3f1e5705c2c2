"""The model computed layer by layer, one layer in memory: PyTorch and the graph side by side."""
