"""The decoder as an ONNX graph, written to be read side by side with the PyTorch model."""
