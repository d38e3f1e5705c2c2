"""Which provider runs which node, as ONNX Runtime reports it."""
