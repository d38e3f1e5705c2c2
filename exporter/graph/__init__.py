"""The decoder as an ONNX graph; reads beside the PyTorch model."""
