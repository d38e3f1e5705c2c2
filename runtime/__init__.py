"""Model package -> tokens. Light: onnxruntime, onnxruntime-genai, numpy."""
