"""Runs PyTorch and the graph side by side, layer by layer, with one layer in memory."""
